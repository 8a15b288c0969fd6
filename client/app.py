"""Flower's ClientApp: a node says which client it is, and answers what it is asked."""

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedtune.flower.client_app import answer, hello
from fedtune.quiet import quiet

app = ClientApp()


@app.query("hello")
def on_hello(message: Message, context: Context) -> Message:
    """Which client this node is."""
    return hello(message, context)


@app.train("ask")
def on_ask(message: Message, context: Context) -> Message:
    """The client's half of a round."""
    quiet()
    return answer(message, context)

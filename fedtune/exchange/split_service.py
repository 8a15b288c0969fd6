"""The body service behind the exchange's door: the same port, mutual TLS and allow list, and clients' names from their certificates.

tokens = Tokens(private.shared_key(folder / "split.key"))  # the run and the service, two processes, read one key
service = body_service(recipe, tokens, over(desk.book))    # started; holds the body's blocks and nothing else
serve(desk, coordinator, address, **alongside(service))
...
client.body = body_at(identity, address, run, token, told)  # at a site; run, token and told come in its signed ticket
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import grpc

from fedtune.config import Recipe, method_of
from fedtune.errors import FedtuneError
from fedtune.exchange.book import Book
from fedtune.exchange.tls import Door, client_credentials
from fedtune.methods.sfprompt_net import BodyAt
from fedtune.methods.sfprompt_site import offer_of
from fedtune.split.body import Frozen
from fedtune.split.channel import Dial, Socket
from fedtune.split.frames import CHUNK, LONGEST
from fedtune.split.merge import MERGING
from fedtune.split.selftest import digest
from fedtune.split.service import TERMS, Service, Terms, handler
from fedtune.split.session import Offer, Tokens
from fedtune.trust import Identity

# --- the coordinator's machine ----------------------------------------------------------------------------------------


def body_service(recipe: Recipe, tokens: Tokens, over: Callable[[str, int], bool], terms: Terms = TERMS) -> Service:
    """The body of a recipe's model, loaded alone, for whoever shows a token of a round that is not over. It is started.

    Which base it belongs to is not known here: its digest is what a site asks for, and a site checks its answers against the coordinator's card.
    Raises C104 for a method that splits nothing, S701, S702, S704, M301.
    """
    method = method_of(recipe)
    if not hasattr(method, "load_body"):
        raise FedtuneError("C104", f"method.type = '{method.type}' with a body service", "'sfprompt'", "start the exchange alone")
    part = method.load_body(recipe.model, recipe.data.task)
    offer = Offer("", digest(part, "body"), part.cut.k, part.cut.m, part.width)
    merging = MERGING if getattr(recipe.method, "merge", False) else None
    return Service(Frozen(part), offer, tokens.admit, terms, merging, over).start()


def over(book: Book) -> Callable[[str, int], bool]:
    """For `body_service`: a round is over unless a verb of it is open in the exchange's book."""
    return lambda run, round: not any(progress.open for progress in book.progress(run) if progress.round == round)


def alongside(service: Service) -> dict[str, Any]:
    """For `exchange.serve(desk, coordinator, address, **alongside(service))`; the service must have been started.

    Its streams take threads of the server's pool, a few more than there are sessions, for those who are told that there is no room.
    """
    return {"also": [behind(service)], "threads": service.terms.sessions + 8, "longest": LONGEST + CHUNK}


def behind(service: Service) -> Callable[[Door], grpc.GenericRpcHandler]:
    """The service's handler behind a door, which names and checks the peer."""
    return lambda door: handler(service, lambda context: door.peer(context).name.name)


# --- a site -----------------------------------------------------------------------------------------------------------


def body_at(identity: Identity, address: str, run: str, token: str, told: Mapping[str, str], beat: float = 5.0) -> BodyAt:
    """The way to the body for one ticket, which is what `Client.body` is. Raises S702 for words that `tell` does not say.

    run    as in the ticket
    token  Tokens.issue(run, round, client's number, client's name), issued by the coordinator
    told   as `SFPrompt.tell` made it
    """
    offer, card = offer_of(told)
    return BodyAt(dial(identity, address, beat), offer, run, lambda round, client: token, card)


def dial(identity: Identity, address: str, beat: float = 5.0) -> Dial:
    """How a site reaches the body service, as the member that it is; each stream is a connection of its own."""

    def connect() -> Socket:
        return Socket(address, client_credentials(identity), [("grpc.use_local_subchannel_pool", 1)], beat)

    return connect

"""What Flower's messages between server and nodes hold, and how they are sent and awaited.

A message to a node holds the question in a ConfigRecord and the payload, in fedtune's own wire format, as ONE
flat
byte array: Flower moves every array as at least two HTTP objects per hop, so that 448 tensors of 7 MB took 37
s a
round and one array 5.5 s. The message loop is our own push and pull: Flower's `send_and_receive` sleeps 3 s.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

from fedtune.errors import ClientFailed, FedtuneError, Refused
from fedtune.runtime.protocol import Ask, Reply
from fedtune.types import Round

ASK, HELLO = "train.ask", "query.hello"  # Flower's message types
STYPE = "fedtune.v1"  # marks our bytes, so that nothing tries to read them as an ndarray
SAME = "install the same version of fedtune on server and nodes"


class Grid(Protocol):
    """What we use of Flower's Grid; flwr.serverapp.Grid has it."""

    def get_node_ids(self) -> Iterable[int]: ...

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]: ...

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]: ...


class Post:
    """Messages under way, each under a key of the sender's. Flower's own error replies bear the SuperLink's
    number instead
    of the failed node's, so an answer is known by the message that it answers."""

    def __init__(self, grid: Grid) -> None:
        self.grid = grid
        self.waiting: dict[str, int] = {}  # message id -> key
        self.refused: list[int] = []

    def send(self, key: int, message: Message) -> None:
        """One push a message: a batch comes back shorter, and from some grids without a gap, where Flower
        refuses one."""
        identity = next(iter(self.grid.push_messages([message])), None)
        if identity:
            self.waiting[identity] = key
        else:
            self.refused.append(key)

    def pull(self) -> Iterator[tuple[int, Message]]:
        """What has come in since the last time."""
        for answer in self.grid.pull_messages(list(self.waiting)) if self.waiting else []:
            key = self.waiting.pop(answer.metadata.reply_to_message_id, None)
            if key is not None:
                yield key, answer

    def answers(self, seconds: float) -> Iterator[tuple[int, Message | FedtuneError]]:
        """Every answer as it comes; a failure for each message that Flower refused or that nobody answered in
        time."""
        for key in self.refused:
            yield (
                key,
                ClientFailed(
                    "F503",
                    sentence="Flower could not deliver a message",
                    do="check that the node is connected, and look at its log",
                ),
            )
        began = time.monotonic()
        while self.waiting and time.monotonic() < began + seconds:
            yield from self.pull()
            if self.waiting:
                pause(began)
        for key in self.waiting.values():
            yield (
                key,
                ClientFailed(
                    "F503",
                    sentence=f"the node did not answer within {seconds:.0f} s",
                    do="look at the node's log",
                ),
            )


def pause(began: float) -> None:
    """Sleep between two polls: 5 % of what was waited so far, so that polling costs neither a quick round nor
    a busy server."""
    time.sleep(min(0.5, max(0.01, 0.05 * (time.monotonic() - began))))


# --- a question and its answer, as records ---


def write_ask(ask: Ask, recipe: str, node: int, seconds: float) -> Message:
    """The message for a node; `recipe` in its canonical form."""
    now = ask.now
    question = {
        "verb": ask.verb,
        "client": ask.client,
        "last": ask.last,
        "first": ask.first,
        "recipe": recipe,
    }
    question |= {"round": now.number, "seed": now.seed, "members": list(now.members)}
    return Message(
        RecordDict({"ask": ConfigRecord(question), "payload": wrap(ask.payload)}), node, ASK, ttl=seconds
    )


def read_ask(message: Message) -> Ask:
    """The question in a message. Raises Refused (W601)."""
    try:
        asked = message.content["ask"]
        now = Round(int(asked["round"]), int(asked["seed"]), tuple(int(m) for m in asked["members"]))
        payload = unwrap(message.content["payload"])
        return Ask(
            int(asked["client"]), str(asked["verb"]), now, payload, int(asked["last"]), bool(asked["first"])
        )
    except (KeyError, TypeError, ValueError) as error:
        found = f"a message without a readable question ({type(error).__name__})"
        raise Refused("W601", found, "verb, client, round, seed, members", SAME) from None


def write_answer(reply: Reply, to: Message) -> Message:
    """A reply as the answer to a message; a failure as its code and sentence."""
    error = reply.failure
    code, found, expected, do = (
        (error.code, error.found, error.expected, error.do) if error else ("", "", "", "")
    )
    outcome = ConfigRecord({"code": code, "found": found, "expected": expected, "do": do, "said": reply.said})
    return Message(RecordDict({"outcome": outcome, "payload": wrap(reply.payload)}), reply_to=to)


def read_answer(client: int, answer: Message | FedtuneError) -> Reply:
    """A node's message as a reply; its failure, or Flower's, as a sentence."""
    if isinstance(answer, FedtuneError):
        return Reply(client, failure=answer)
    if answer.has_error():
        reason = ((answer.error.reason or "").strip() or "no reason given").splitlines()[0]
        sentence = f"Flower reports error {answer.error.code} instead of the node's answer ({reason[:200]})"
        return Reply(client, failure=ClientFailed("F503", sentence=sentence, do="look at the node's log"))
    try:
        outcome = answer.content["outcome"]
        if outcome["code"]:
            return Reply(
                client,
                failure=ClientFailed(*(str(outcome[part]) for part in ("code", "found", "expected", "do"))),
            )
        return Reply(client, unwrap(answer.content["payload"]), said=str(outcome["said"]))
    except (KeyError, TypeError, AttributeError) as error:
        found = f"a node's answer that cannot be read ({type(error).__name__})"
        return Reply(client, failure=Refused("W601", found, "an outcome and a payload", SAME))


def wrap(payload: bytes) -> ArrayRecord:
    return ArrayRecord({"bytes": Array(dtype="uint8", shape=(len(payload),), stype=STYPE, data=payload)})


def unwrap(record: Any) -> bytes:
    return bytes(record["bytes"].data)

"""Where fedtune meets Flower (with flower_engine.py, and nowhere else). Flower carries the questions and answers of a cohort; the rest of a run is ours.

A message to a node holds the question in a ConfigRecord and the payload, in fedtune's own wire format, as ONE flat
byte array: Flower moves every array as at least two HTTP objects per hop, so that 448 tensors of 7 MB took 37 s a
round and one array 5.5 s. The message loop is our own push and pull: Flower's `send_and_receive` sleeps 3 s.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from safetensors.numpy import load, save

from fedtune import config
from fedtune.errors import ClientFailed, FedtuneError, Refused
from fedtune.events import Event, Noted
from fedtune.runtime.client_half import Versions, memory_after, memory_before, respond
from fedtune.runtime.failures import failure_of
from fedtune.runtime.folder import RunFolder, create
from fedtune.runtime.protocol import Ask, Carrier, Link, Reply
from fedtune.runtime.ranks import settled
from fedtune.runtime.run import run
from fedtune.runtime.shelf import load_versions, save_versions
from fedtune.runtime.states import Memories
from fedtune.runtime.world import World, build_world, link_of
from fedtune.types import Round

ASK, HELLO = "train.ask", "query.hello"  # Flower's message types
STYPE = "fedtune.v1"  # marks our bytes, so that nothing tries to read them as an ndarray
WAIT_SECONDS = 600.0  # for nodes to connect and say who they are
ANSWER_SECONDS = 3600.0  # for one answer; after it the round goes on without that client
SAME = "run the same fedtune on server and nodes"
LATE_SECONDS = 20.0  # until it is said which nodes are waited for
IN_SIMULATION = "in Flower's own simulation, flwr run --federation-config num-supernodes=N makes N"
NODE_CONFIG = "give every SuperNode its own: --node-config 'partition-id=N'"


class Grid(Protocol):
    """What we use of Flower's Grid; flwr.serverapp.Grid has it."""

    def get_node_ids(self) -> Iterable[int]: ...

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]: ...

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]: ...


# --- at the server ----------------------------------------------------------------------------------------------


def flower_carrier(grid: Grid, recipe: config.Recipe, nodes: dict[int, int], seconds: float = ANSWER_SECONDS) -> Carrier:
    """Ask members through Flower's grid. `nodes`: client id -> node id; `seconds`: how long one answer may take."""
    text = recipe.canonical()

    def message(ask: Ask) -> Message:
        now = ask.now
        question = {"verb": ask.verb, "client": ask.client, "last": ask.last, "first": ask.first, "recipe": text}
        question |= {"round": now.number, "seed": now.seed, "members": list(now.members)}
        return Message(RecordDict({"ask": ConfigRecord(question), "payload": wrap(ask.payload)}), nodes[ask.client], ASK, ttl=seconds)

    def carry(asks: Sequence[Ask]) -> Iterator[Reply]:
        post = Post(grid)
        for ask in asks:
            post.send(ask.client, message(ask))
        for client, answer in post.answers(seconds):
            yield read_answer(client, answer)

    return carry


class Post:
    """Messages under way, each under a key of the sender's. Flower's own error replies bear the SuperLink's number instead
    of the failed node's, so an answer is known by the message that it answers."""

    def __init__(self, grid: Grid) -> None:
        self.grid = grid
        self.waiting: dict[str, int] = {}  # message id -> key
        self.refused: list[int] = []

    def send(self, key: int, message: Message) -> None:
        """One push a message: a batch comes back shorter, and from some grids without a gap, where Flower refuses one."""
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
        """Every answer as it comes; a failure for each message that Flower refused or that nobody answered in time."""
        for key in self.refused:
            yield key, ClientFailed("F503", "a message that Flower did not take", "a connected node", "look at the node's log")
        began = time.monotonic()
        while self.waiting and time.monotonic() < began + seconds:
            yield from self.pull()
            if self.waiting:
                pause(began)
        for key in self.waiting.values():
            yield key, ClientFailed("F503", f"no answer within {seconds:.0f} s", "an answer", "look at the node's log")


def pause(began: float) -> None:
    """Sleep between two polls: 5 % of what was waited so far, so that polling costs neither a quick round nor a busy server."""
    time.sleep(min(0.5, max(0.01, 0.05 * (time.monotonic() - began))))


def read_answer(client: int, answer: Message | FedtuneError) -> Reply:
    """A node's message as a reply; its failure, or Flower's, as a sentence."""
    if isinstance(answer, FedtuneError):
        return Reply(client, failure=answer)
    if answer.has_error():
        reason = ((answer.error.reason or "").strip() or "no reason given").splitlines()[0]
        found = f"Flower's error {answer.error.code} instead of a node's answer ({reason[:200]})"
        return Reply(client, failure=ClientFailed("F503", found, "an answer", "look at the node's log"))
    try:
        outcome = answer.content["outcome"]
        if outcome["code"]:
            return Reply(client, failure=ClientFailed(*(str(outcome[part]) for part in ("code", "found", "expected", "do"))))
        return Reply(client, unwrap(answer.content["payload"]), said=str(outcome["said"]))
    except (KeyError, TypeError, AttributeError) as error:
        found = f"a node's answer that cannot be read ({type(error).__name__})"
        return Reply(client, failure=Refused("W601", found, "an outcome and a payload", SAME))


def find_nodes(grid: Grid, wanted: int, seconds: float = WAIT_SECONDS, say: Callable[[str], None] = lambda text: None) -> dict[int, int]:
    """Client id -> node id, once there is a node for each of `wanted` clients and every node greeted so far has answered. Waiting is said once.

    Raises F502 where nodes are missing after `seconds`, F503 where a node does not say which client it is or two say the same.
    """
    post, nodes, silent = Post(grid), dict[int, int](), set[int]()
    began, said = time.monotonic(), False
    while time.monotonic() < began + seconds:
        if not said and time.monotonic() > began + LATE_SECONDS:
            said = True
            say(f"waiting for nodes: {len(nodes)} of {wanted} clients have one ({IN_SIMULATION})")
        for node in sorted(set(grid.get_node_ids()) - nodes.keys() - silent):
            silent.add(node)
            post.send(node, Message(RecordDict({}), node, HELLO, ttl=seconds))
        for node, answer in post.pull():
            if not answer.has_error():  # an error: a node that has gone; another may come in its place
                nodes[node] = client_of(answer, nodes.values())
                silent.discard(node)
        known = {client: node for node, client in nodes.items()}
        if not post.waiting and not set(range(wanted)) - known.keys():
            return known
        pause(began)
    missing = sorted(set(range(wanted)) - set(nodes.values()))
    found = f"no node for client {missing[0]} after {seconds:.0f} s ({len(nodes)} nodes answered)" if missing else f"a node silent for {seconds:.0f} s"
    do = f"start the SuperNodes that are missing, or lower partition.clients; {IN_SIMULATION}; {NODE_CONFIG}"
    raise FedtuneError("F502", found, f"partition-id 0 to {wanted - 1}", do)


def client_of(answer: Message, taken: Iterable[int]) -> int:
    """The client that a node says it is. Raises F503."""
    try:
        client = int(answer.content["hello"]["client"])
    except (KeyError, TypeError, ValueError):
        client = -1
    if client < 0:
        raise FedtuneError("F503", "a node that does not say which client it is", "a partition-id", NODE_CONFIG)
    if client in taken:
        raise FedtuneError("F503", f"two nodes that both say they are client {client}", "a partition-id of its own for each", NODE_CONFIG)
    return client


def serve(grid: Grid, recipe: config.Recipe, folder: RunFolder, tell: Callable[[Event], None], wait: float = WAIT_SECONDS) -> dict[str, Any]:
    """A whole run with Flower's nodes as clients; the journal and the bytes are those of a local run."""

    def say(text: str) -> None:
        tell(Noted(text))

    return run(recipe, folder, tell, lambda link, world: flower_carrier(grid, recipe, find_nodes(grid, len(world.names), wait, say)))


def serve_context(grid: Grid, context: Context, app_folder: Path, sinks: Callable[[RunFolder], Callable[[Event], None]]) -> None:
    """`flwr run`: recipe, overrides and runs folder from the run config; relative paths count from the SuperLink's folder, a recipe's also from the app's."""
    options = {key: str(context.run_config.get(key, "")) for key in ("recipe", "set", "runs")}
    path = options["recipe"]
    if path and not Path(path).exists() and (app_folder / path).exists():
        path = str(app_folder / path)
    recipe = settled(config.read(path or None, options["set"].split()))
    folder = create(Path(options["runs"] or "runs"), recipe.name, Path(path).stem if path else "demo")
    folder.begin(recipe)
    serve(grid, recipe, folder, sinks(folder))


# --- at a node --------------------------------------------------------------------------------------------------


def hello(message: Message, context: Context) -> Message:
    """Which client this node is: its `partition-id`, or -1 where it has none."""
    return Message(RecordDict({"hello": ConfigRecord({"client": int(context.node_config.get("partition-id", -1))})}), reply_to=message)


def answer(message: Message, context: Context, shelf: Path | None = None) -> Message:
    """Do what is asked; a mistake travels back as its code and sentence, never as a traceback.

    The client's memory lies on `shelf`, or in the folder that the node's config calls `memory`, and then outlives the
    SuperNode; otherwise in Flower's per-node state, which is RAM. The server never says where: it has no say over a site's disk.
    """
    place, name = shelf, "?"
    try:
        ask = read_ask(message)
        world, link = worlds(str(message.content["ask"]["recipe"]))
        name = world.names.get(ask.client, str(ask.client))
        place = shelf or (Path(str(context.node_config["memory"])) / link.run if "memory" in context.node_config else None)
        versions = load_memory(context, place, ask.client)
        client = world.client_with(ask.client, memory_before(versions, ask))
        reply = respond(link, client, ask)
        save_memory(context, place, ask.client, memory_after(versions, ask, client.memory))
        outcome = {"code": "", "found": "", "expected": "", "do": "", "said": reply.said}
        payload = reply.payload
    except Exception as cause:  # whatever it is, it is about this client
        error = failure_of(cause, name, place / "errors" if place else None)
        payload, outcome = b"", {"code": error.code, "found": error.found, "expected": error.expected, "do": error.do}
    return Message(RecordDict({"outcome": ConfigRecord(outcome), "payload": wrap(payload)}), reply_to=message)


def read_ask(message: Message) -> Ask:
    """The question in a message. Raises Refused (W601)."""
    try:
        asked = message.content["ask"]
        now = Round(int(asked["round"]), int(asked["seed"]), tuple(int(m) for m in asked["members"]))
        payload = unwrap(message.content["payload"])
        return Ask(int(asked["client"]), str(asked["verb"]), now, payload, int(asked["last"]), bool(asked["first"]))
    except (KeyError, TypeError, ValueError) as error:
        found = f"a message without a readable question ({type(error).__name__})"
        raise Refused("W601", found, "verb, client, round, seed, members", SAME) from None


_worlds: dict[str, tuple[World, Link]] = {}  # this process's model and data, by recipe: an actor answers for many clients


def worlds(recipe_json: str) -> tuple[World, Link]:
    """Build the world of a recipe once a process."""
    if recipe_json not in _worlds:
        recipe = config.Recipe.model_validate_json(recipe_json)
        method = config.method_of(recipe)
        world = build_world(recipe, method, Memories(None), lambda event: None)
        _worlds.clear()  # one recipe at a time: two models may not fit
        _worlds[recipe_json] = world, link_of(world, method)
    return _worlds[recipe_json]


def load_memory(context: Context, place: Path | None, client: int) -> Versions:
    """The client's memories, by round."""
    if place:
        return load_versions(place, client)
    return {int(number): dict(load(bytes(tensors))) for number, tensors in context.state.get("memory", {}).items()}


def save_memory(context: Context, place: Path | None, client: int, versions: Versions) -> None:
    """Keep these memories and no others; on disk, each file is whole or absent."""
    if place:
        save_versions(place, client, versions)
    else:
        context.state["memory"] = ConfigRecord({str(number): save(tensors) for number, tensors in versions.items()})


def wrap(payload: bytes) -> ArrayRecord:
    return ArrayRecord({"bytes": Array(dtype="uint8", shape=(len(payload),), stype=STYPE, data=payload)})


def unwrap(record: Any) -> bytes:
    return bytes(record["bytes"].data)

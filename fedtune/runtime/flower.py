"""The only module that speaks Flower. Flower carries the questions and answers of a cohort; the rest of a run is ours.

A message to a node holds the question in a ConfigRecord and the payload, in fedtune's own wire format, as ONE flat
byte array: Flower moves every array as at least two HTTP objects per hop, so that 448 tensors of 7 MB took 37 s a
round and one array 5.5 s. The message loop is our own push and pull: Flower's `send_and_receive` sleeps 3 s.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid

from fedtune import config, methods, transforms
from fedtune.errors import ClientFailed, FedtuneError, Refused
from fedtune.events import Event
from fedtune.runtime.cohort import Ask, Carrier, Link, Reply, respond
from fedtune.runtime.states import Memories
from fedtune.runtime.world import World, build_world
from fedtune.types import Client, Round

ASK, HELLO = "train.ask", "query.hello"  # Flower's message types
STYPE = "fedtune.v1"  # marks our bytes, so that nothing tries to read them as an ndarray
POLL_SECONDS = 0.05


# --- at the server ----------------------------------------------------------------------------------------------


def flower_carrier(grid: Grid, link: Link, recipe: config.Recipe, nodes: dict[int, int], deadline: float) -> Carrier:
    """Ask members through Flower's grid. `nodes`: client id -> node id; `deadline`: seconds for one question."""

    def message(ask: Ask) -> Message:
        question = {
            "verb": ask.verb,
            "client": ask.client,
            "round": ask.now.number,
            "seed": ask.now.seed,
            "members": list(ask.now.members),
            "recipe": recipe.canonical(),
        }
        return Message(RecordDict({"ask": ConfigRecord(question), "payload": wrap(ask.payload)}), nodes[ask.client], ASK, ttl=deadline)

    def carry(asks: Sequence[Ask]) -> Iterator[Reply]:
        for client, answer in conversation(grid, {ask.client: message(ask) for ask in asks}, deadline):
            yield answer if isinstance(answer, Reply) else read_answer(client, answer)

    return carry


def conversation(grid: Grid, messages: dict[int, Message], deadline: float) -> Iterator[tuple[int, Message | Reply]]:
    """Push one message per client, yield each answer as it comes. Flower's own error replies bear the sender's number 1,
    so the client is found by the message that was answered."""
    pushed = list(grid.push_messages(messages.values()))
    waiting = {identity: client for identity, client in zip(pushed, messages, strict=True) if identity}
    for client in set(messages) - set(waiting.values()):
        yield client, Reply(client, failure=ClientFailed("F503", "a message that Flower did not take", "a connected node", "look at the node's log"))
    end = time.monotonic() + deadline
    while waiting and time.monotonic() < end:
        for answer in grid.pull_messages(list(waiting)):
            yield waiting.pop(answer.metadata.reply_to_message_id), answer
        time.sleep(POLL_SECONDS if waiting else 0)
    for client in waiting.values():
        yield (
            client,
            Reply(client, failure=ClientFailed("F503", f"no answer within {deadline:.0f} s", "an answer", "look at the node's log, or raise the deadline")),
        )


def read_answer(client: int, answer: Message) -> Reply:
    """A node's message as a reply; its failure, or Flower's, as a sentence."""
    if answer.has_error():
        reason = (answer.error.reason or "no reason given").splitlines()[0]
        return Reply(
            client, failure=ClientFailed("F503", f"Flower's error {answer.error.code} from a node ({reason[:200]})", "an answer", "look at the node's log")
        )
    outcome = answer.content["outcome"]
    if outcome["code"]:
        failure = ClientFailed(str(outcome["code"]), str(outcome["found"]), str(outcome["expected"]), str(outcome["do"]))
        return Reply(client, failure=failure)
    return Reply(client, unwrap(answer.content["payload"]))


def find_nodes(grid: Grid, wanted: int, seconds: float) -> dict[int, int]:
    """Client id -> node id, once `wanted` nodes have connected and said which client they are. Raises F502, F503."""
    end = time.monotonic() + seconds
    while len(ids := sorted(grid.get_node_ids())) < wanted:
        if time.monotonic() > end:
            raise FedtuneError(
                "F502",
                f"{len(ids)} connected nodes after {seconds:.0f} s",
                f"{wanted}, one for each client",
                "start more SuperNodes, or lower partition.clients",
            )
        time.sleep(POLL_SECONDS)
    nodes: dict[int, int] = {}
    hello = {node: Message(RecordDict({}), node, HELLO, ttl=seconds) for node in ids}
    for node, answer in conversation(grid, hello, seconds):
        if isinstance(answer, Message) and not answer.has_error():
            client = int(answer.content["hello"]["client"])  # type: ignore[arg-type]
            if client in nodes:
                raise FedtuneError(
                    "F503",
                    f"two nodes that both say they are client {client}",
                    "a partition-id of its own for each",
                    "set --node-config 'partition-id=N' on every SuperNode",
                )
            nodes[client] = node
    missing = sorted(set(range(wanted)) - nodes.keys())
    if missing:
        raise FedtuneError(
            "F502", f"no node for client {missing[0]}", f"partition-id 0 to {wanted - 1}", "set --node-config 'partition-id=N' on every SuperNode"
        )
    return nodes


def serve(grid: Grid, recipe: config.Recipe, folder: Any, tell: Callable[[Event], None], wait: float = 600.0, deadline: float = 3600.0) -> dict[str, Any]:
    """A whole run with Flower's nodes as clients; the journal and the bytes are those of a local run."""
    from fedtune.runtime.run import run

    def carry(link: Link, world: World) -> Carrier:
        return flower_carrier(grid, link, recipe, find_nodes(grid, len(world.names), wait), deadline)

    return run(recipe, folder, tell, carry)


def serve_context(grid: Grid, context: Context, app_folder: Path) -> None:
    """`flwr run`: recipe path, overrides and runs folder come from the run config."""
    from fedtune.cli.common import sinks
    from fedtune.runtime.folder import create

    options = {key: str(context.run_config.get(key, "")) for key in ("recipe", "set", "runs")}
    path = options["recipe"]
    if path and not Path(path).exists() and (app_folder / path).exists():
        path = str(app_folder / path)
    recipe = config.read(path or None, options["set"].split())
    folder = create(Path(options["runs"] or "runs"), recipe.name, Path(path).stem if path else "demo")
    folder.write_json("config.json", recipe.model_dump(mode="json"))
    serve(grid, recipe, folder, sinks(folder))


# --- at a node --------------------------------------------------------------------------------------------------


def hello(message: Message, context: Context) -> Message:
    """Which client this node is: its `partition-id`."""
    return Message(RecordDict({"hello": ConfigRecord({"client": int(context.node_config["partition-id"])})}), reply_to=message)


def answer(message: Message, context: Context) -> Message:
    """Do what is asked; a mistake travels back as its code and sentence, never as a traceback."""
    try:
        ask = read_ask(message)
        world, link = worlds(str(message.content["ask"]["recipe"]))
        memory = load_memory(context)
        client = Client(ask.client, world.names[ask.client], world.bench, world.train(ask.client), memory)
        payload = respond(link, client, ask)
        context.state["memory"] = save_memory(memory)
        outcome = {"code": "", "found": "", "expected": "", "do": ""}
    except FedtuneError as error:
        payload, outcome = b"", {"code": error.code, "found": error.found, "expected": error.expected, "do": error.do}
    return Message(RecordDict({"outcome": ConfigRecord(outcome), "payload": wrap(payload)}), reply_to=message)


def read_ask(message: Message) -> Ask:
    """The question in a message. Raises Refused (W601)."""
    try:
        asked = message.content["ask"]
        now = Round(int(asked["round"]), int(asked["seed"]), tuple(int(m) for m in asked["members"]))
        return Ask(int(asked["client"]), str(asked["verb"]), now, unwrap(message.content["payload"]))
    except (KeyError, TypeError, ValueError) as error:
        raise Refused(
            "W601",
            f"a message without a readable question ({type(error).__name__})",
            "verb, client, round, seed, members",
            "run the same fedtune on server and nodes",
        ) from None


_worlds: dict[str, tuple[World, Link]] = {}  # this process's model and data, by recipe: an actor answers for many clients


def worlds(recipe_json: str) -> tuple[World, Link]:
    """Build the world of a recipe once a process."""
    if recipe_json not in _worlds:
        recipe = config.Recipe.model_validate_json(recipe_json)
        method = methods.build(recipe.method, recipe.rounds)
        world = build_world(recipe, method, Memories(None), lambda event: None)
        _worlds.clear()  # one recipe at a time: two models may not fit
        _worlds[recipe_json] = world, Link(recipe.fingerprint[:16], world.base.fingerprint, method, transforms.build(recipe.chain))
    return _worlds[recipe_json]


def load_memory(context: Context) -> dict[str, Any]:
    """The client's memory from Flower's per-node state."""
    from safetensors.numpy import load

    record = context.state.get("memory")
    return dict(load(bytes(record["tensors"]))) if record else {}


def save_memory(memory: dict[str, Any]) -> ConfigRecord:
    from safetensors.numpy import save

    return ConfigRecord({"tensors": save(memory)})


def wrap(payload: bytes) -> ArrayRecord:
    return ArrayRecord({"bytes": Array(dtype="uint8", shape=(len(payload),), stype=STYPE, data=payload)})


def unwrap(record: Any) -> bytes:
    return bytes(record["bytes"].data)


# --- Flower's simulation engine ---------------------------------------------------------------------------------


def simulation(recipe: config.Recipe, folder: Any, tell: Callable[[Event], None]) -> dict[str, Any]:
    """The run on Flower's simulation engine (Ray), one virtual node per client. Raises F501.

    `run_simulation` is deprecated in favour of `flwr run`, which keeps a SuperLink running behind the user's back and
    takes 12 s longer to start; the pin on flwr 1.41 makes it safe to use, and this is its only call.
    """
    os.environ.setdefault("RAY_AUTH_MODE", "token")  # Ray listens on all interfaces, and without a token to anybody
    try:
        import ray  # noqa: F401
        from flwr.simulation import run_simulation
    except ImportError:
        raise FedtuneError("F501", "no Ray", "Flower's simulation engine", "install it with: pip install 'flwr[simulation]'") from None
    from flwr.clientapp import ClientApp
    from flwr.serverapp import ServerApp

    from fedtune.data import load

    server, client = ServerApp(), ClientApp()
    box: list[Any] = []

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        try:
            box.append(serve(grid, recipe, folder, tell))
        except BaseException as error:  # the engine would only log it
            box.append(error)

    client.query("hello")(hello)
    client.train("ask")(answer)
    nodes = len(load(recipe.data, recipe.partition, recipe.seed).clients)
    run_simulation(server, client, nodes, backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}})
    if not box or isinstance(box[0], BaseException):
        raise box[0] if box else FedtuneError("F503", "a simulation that ended without a result", "a result", "set FEDTUNE_DEBUG=1 and look at Flower's log")
    return dict(box[0])

"""The only module that speaks Flower. Flower carries the questions and answers of a cohort; the rest of a run is ours.

A message to a node holds the question in a ConfigRecord and the payload, in fedtune's own wire format, as ONE flat
byte array: Flower moves every array as at least two HTTP objects per hop, so that 448 tensors of 7 MB took 37 s a
round and one array 5.5 s. The message loop is our own push and pull: Flower's `send_and_receive` sleeps 3 s.
"""

from __future__ import annotations

import concurrent.futures.thread
import contextlib
import logging
import os
import queue
import secrets
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from safetensors.numpy import load, save

from fedtune import config, methods, transforms
from fedtune.errors import ClientFailed, FedtuneError, Refused
from fedtune.events import Event
from fedtune.runtime.cohort import Ask, Carrier, Link, Reply, Versions, memory_after, memory_before, respond
from fedtune.runtime.folder import RunFolder, create
from fedtune.runtime.run import run
from fedtune.runtime.states import Memories
from fedtune.runtime.world import World, build_world
from fedtune.types import Round

ASK, HELLO = "train.ask", "query.hello"  # Flower's message types
STYPE = "fedtune.v1"  # marks our bytes, so that nothing tries to read them as an ndarray
WAIT_SECONDS = 600.0  # for nodes to connect and say who they are
ANSWER_SECONDS = 3600.0  # for one answer; after it the round goes on without that client
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
SAME = "run the same fedtune on server and nodes"
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


def find_nodes(grid: Grid, wanted: int, seconds: float = WAIT_SECONDS) -> dict[int, int]:
    """Client id -> node id, once there is a node for each of `wanted` clients and every node greeted so far has answered.

    Raises F502 where nodes are missing after `seconds`, F503 where a node does not say which client it is or two say the same.
    """
    post, nodes, silent = Post(grid), dict[int, int](), set[int]()
    began = time.monotonic()
    while time.monotonic() < began + seconds:
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
    raise FedtuneError("F502", found, f"partition-id 0 to {wanted - 1}", f"start the SuperNodes that are missing, or lower partition.clients; {NODE_CONFIG}")


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
    return run(recipe, folder, tell, lambda link, world: flower_carrier(grid, recipe, find_nodes(grid, len(world.names), wait)))


def serve_context(grid: Grid, context: Context, app_folder: Path, sinks: Callable[[RunFolder], Callable[[Event], None]]) -> None:
    """`flwr run`: recipe, overrides and runs folder from the run config; relative paths count from the SuperLink's folder, a recipe's also from the app's."""
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
    """Which client this node is: its `partition-id`, or -1 where it has none."""
    return Message(RecordDict({"hello": ConfigRecord({"client": int(context.node_config.get("partition-id", -1))})}), reply_to=message)


def answer(message: Message, context: Context) -> Message:
    """Do what is asked; a mistake travels back as its code and sentence, never as a traceback."""
    try:
        ask = read_ask(message)
        world, link = worlds(str(message.content["ask"]["recipe"]))
        versions = load_memory(context)
        client = world.client_with(ask.client, memory_before(versions, ask))
        payload = respond(link, client, ask)
        context.state["memory"] = save_memory(memory_after(versions, ask, client.memory))
        outcome = {"code": "", "found": "", "expected": "", "do": "", "said": link.chain.said}
    except FedtuneError as error:
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
        method = methods.build(recipe.method, recipe.rounds)
        world = build_world(recipe, method, Memories(None), lambda event: None)
        _worlds.clear()  # one recipe at a time: two models may not fit
        _worlds[recipe_json] = world, Link(recipe.fingerprint[:16], world.base.fingerprint, method, transforms.build(recipe.chain), recipe.downlink)
    return _worlds[recipe_json]


def load_memory(context: Context) -> Versions:
    """The client's memories, by round, from Flower's per-node state. A SuperNode holds it in RAM: it is lost when the node restarts."""
    return {int(number): dict(load(bytes(tensors))) for number, tensors in context.state.get("memory", {}).items()}


def save_memory(versions: Versions) -> ConfigRecord:
    return ConfigRecord({str(number): save(tensors) for number, tensors in versions.items()})


def wrap(payload: bytes) -> ArrayRecord:
    return ArrayRecord({"bytes": Array(dtype="uint8", shape=(len(payload),), stype=STYPE, data=payload)})


def unwrap(record: Any) -> bytes:
    return bytes(record["bytes"].data)


# --- Flower's simulation engine ---------------------------------------------------------------------------------


def simulation(recipe: config.Recipe, folder: RunFolder, tell: Callable[[Event], None]) -> dict[str, Any]:
    """The run on Flower's simulation engine (Ray), one virtual node per client. Raises F501, F504."""
    with contextlib.ExitStack() as stack:

        def carry(link: Link, world: World) -> Carrier:
            nodes = len(world.names)
            grid = stack.enter_context(engine(nodes, actor_size(recipe.model.threads, world.base.device.type)))
            return flower_carrier(grid, recipe, find_nodes(grid, nodes))

        return run(recipe, folder, tell, carry)


def actor_size(threads: int, device: str) -> dict[str, float]:
    """What one Ray actor takes. Ray gives torch as many threads as the actor has CPUs, and bits may depend on them: so an
    actor takes as many as the local engine would. Where the work is on a GPU, one actor has it to itself."""
    if device == "cuda":
        return {"num_cpus": 1, "num_gpus": 1}
    return {"num_cpus": threads or int(os.environ.get("OMP_NUM_THREADS") or CORES), "num_gpus": 0}


@contextlib.contextmanager
def engine(nodes: int, size: dict[str, float]) -> Iterator[Grid]:
    """Flower's simulation engine with virtual nodes 0 to nodes - 1; it is gone when the block ends. Raises F501, F504.

    `run_simulation` is deprecated in favour of `flwr run`, which keeps a SuperLink running behind the user's back and
    takes 12 s longer to start; the pin on flwr 1.41 makes it safe to use, and this is its only call. It runs in a thread,
    so that a run's own errors, and Ctrl-C, happen where they do in a local run.
    """
    # Ray listens on all interfaces, and without a token it obeys anybody who can connect; it reads both when it is imported.
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"  # else Flower's late calls after Ctrl-C would start a second Ray
    try:
        import ray
        from flwr.clientapp import ClientApp
        from flwr.serverapp import ServerApp
        from flwr.simulation import run_simulation
    except ImportError:
        raise FedtuneError("F501", "no Ray", "Flower's simulation engine", "install it with: pip install 'flwr[simulation]'") from None
    grids: queue.SimpleQueue[Grid | None] = queue.SimpleQueue()
    failures: list[BaseException] = []
    over = threading.Event()

    def main(grid: Any, context: Context) -> None:
        grids.put(grid)
        over.wait()

    server, client = ServerApp(), ClientApp()
    server.main()(main)
    client.query("hello")(hello)
    client.train("ask")(answer)
    # A killed actor is started again and asked once more: the same seeds, the same bytes.
    resources = {**size, "max_restarts": -1, "max_task_retries": 1}

    def work() -> None:
        try:
            run_simulation(server, client, nodes, backend_config={"client_resources": resources})
        except BaseException as error:
            failures.append(error)
        grids.put(None)

    with hushed(ray._private.worker), ray_cluster(ray, nodes, size):
        thread = threading.Thread(target=work, name="flower", daemon=True)
        thread.start()
        try:
            yield Watched(grids.get(), thread, failures)
        finally:
            over.set()
            thread.join(5)
            if thread.is_alive():  # stopped amid a client's work: Flower's pool waits for an answer of Ray's that will not come
                getattr(concurrent.futures.thread, "_threads_queues", {}).clear()  # so that Python's exit does not wait for the pool


@dataclass(frozen=True)
class Watched:
    """A grid that says so when its engine has stopped, instead of waiting for answers that cannot come."""

    grid: Grid | None
    thread: threading.Thread
    failures: list[BaseException]

    def get_node_ids(self) -> Iterable[int]:
        return self.alive().get_node_ids()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        return self.alive().push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return self.alive().pull_messages(message_ids)

    def alive(self) -> Grid:
        if self.grid is None or not self.thread.is_alive():
            raise FedtuneError("F504", f"Flower's simulation engine stopped ({root(*self.failures)})", "a running engine", "see its log with FEDTUNE_DEBUG=1")
        return self.grid


def root(*errors: BaseException) -> str:
    """The first line of what an error began with."""
    for error in errors:
        return root(error.__cause__) if error.__cause__ else (str(error).strip() or type(error).__name__).splitlines()[0][:200]
    return "no reason given"


@contextlib.contextmanager
def ray_cluster(ray: Any, nodes: int, size: dict[str, float]) -> Iterator[None]:
    """A Ray of our own on this machine, no larger than the nodes need; its processes and files are gone afterwards."""
    debug = bool(os.environ.get("FEDTUNE_DEBUG"))
    each, level = int(size["num_cpus"]), logging.INFO if debug else logging.CRITICAL
    with tempfile.TemporaryDirectory(prefix="fedtune-ray-", dir="/tmp", ignore_cleanup_errors=True) as folder:  # /tmp: names of sockets end at 107 characters
        try:
            cpus = max(each, min(CORES, nodes * each))
            ray.init(address="local", num_cpus=cpus, include_dashboard=False, log_to_driver=debug, logging_level=level, _temp_dir=folder)
        except Exception as error:  # Ray raises what comes up: OSError, RuntimeError, its own
            raise FedtuneError("F504", f"a Ray that does not start ({root(error)})", "a running Ray", "see its log with FEDTUNE_DEBUG=1") from error
        try:
            yield
        finally:
            ray.shutdown()


@contextlib.contextmanager
def hushed(ray_worker: Any) -> Iterator[None]:
    """Flower's log, and Ray's, are for FEDTUNE_DEBUG: what users need to know comes as our events."""
    log, before = logging.getLogger("flwr"), logging.getLogger("flwr").level
    if not os.environ.get("FEDTUNE_DEBUG"):
        log.setLevel(logging.CRITICAL + 1)
        # Ray prints its complaints about dead actors to standard output, whatever log_to_driver says; this is its own switch.
        ray_worker._worker_logs_enabled = False
    try:
        yield
    finally:
        log.setLevel(before)
        ray_worker._worker_logs_enabled = True

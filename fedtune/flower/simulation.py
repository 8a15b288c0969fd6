"""Flower's simulation engine (Ray) under a run: started, watched and removed."""

from __future__ import annotations

import concurrent.futures.thread
import contextlib
import logging
import os
import queue
import secrets
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from flwr.app import Context, Message

from fedtune import config
from fedtune.errors import FedtuneError
from fedtune.events import Event
from fedtune.flower.client_app import answer, hello
from fedtune.flower.cluster import actor_size, begun, cluster_size, connected, prepare, root
from fedtune.flower.messages import Grid
from fedtune.flower.server_app import find_nodes, flower_transport
from fedtune.proxies import spared
from fedtune.runtime.folder import RunFolder
from fedtune.runtime.protocol import Link, Transport
from fedtune.runtime.run import run
from fedtune.runtime.workspace import Workspace
from fedtune.threads import available_cores, threads_for


def simulation(
    recipe: config.Recipe, folder: RunFolder, tell: Callable[[Event], None], cluster: str = ""
) -> dict[str, Any]:
    """The run on Flower's simulation engine (Ray), one virtual node per client. Raises F501, F504.

    cluster  the address of a Ray cluster that is there already; "": a Ray of our own on this machine
    """
    with contextlib.ExitStack() as stack:

        def carry(link: Link, workspace: Workspace) -> Transport:
            threads, device = threads_for(recipe.model.threads)[0], workspace.base.device.type
            nodes, shelf = len(workspace.names), folder.path.resolve()
            if cluster:
                ray = stack.enter_context(joined(cluster))
                size = cluster_size(ray, threads, recipe.model.device)
                kept = prepare(ray, recipe, workspace.federation.fingerprint, link.base, shelf, tell)
                grid = stack.enter_context(virtual_nodes(ray, nodes, size, kept, Path.cwd()))
            else:
                grid = stack.enter_context(engine(nodes, actor_size(threads, device), shelf))
            return flower_transport(grid, recipe, find_nodes(grid, nodes))

        return run(recipe, folder, tell, carry)


@contextlib.contextmanager
def engine(nodes: int, size: dict[str, float], shelf: Path | None = None) -> Iterator[Grid]:
    """Flower's simulation engine with virtual nodes 0 to nodes - 1, on a Ray of our own; it is gone when the
    block ends. Raises F501, F504."""
    # Ray listens on all interfaces, and without a token it obeys anybody who can connect; it reads both when
    # it is imported.
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    # Ray starts actors at niceness 15, where one busy program beside them makes a round take minutes.
    os.environ.setdefault("RAY_worker_niceness", "0")
    ray = imported_ray()
    with (
        hushed(ray._private.worker),
        ray_cluster(ray, nodes, size),
        virtual_nodes(ray, nodes, size, shelf) as grid,
    ):
        yield grid


def imported_ray() -> Any:
    """Ray, which reads its settings from the environment when it is imported. Raises F501."""
    os.environ.update(spared(os.environ))  # Ray and Flower talk to their own parts on this machine
    os.environ["RAY_ENABLE_AUTO_CONNECT"] = (
        "0"  # else Flower's late calls after Ctrl-C would start a second Ray
    )
    try:
        import flwr.simulation  # noqa: F401
        import ray
    except ImportError:
        raise FedtuneError(
            "F501",
            sentence="Flower's simulation engine needs Ray, which is not installed",
            do="run: pip install 'fedtune[flower]'",
        ) from None
    return ray


@contextlib.contextmanager
def joined(address: str) -> Iterator[Any]:
    """Ray, connected to somebody else's cluster; its token is the user's own, and none is made up here."""
    ray = imported_ray()
    with hushed(ray._private.worker), connected(ray, address):
        yield ray


@contextlib.contextmanager
def virtual_nodes(
    ray: Any, nodes: int, size: dict[str, float], shelf: Path | None, place: Path | None = None
) -> Iterator[Grid]:
    """Flower's simulation engine with virtual nodes 0 to nodes - 1 on a Ray that is connected. Raises F504.

    `run_simulation` is deprecated in favour of `flwr run`, which keeps a SuperLink running behind the user's
    back and takes 12 s longer to start; the pin on flwr 1.41 makes it safe to use, and this is its only call.
    It runs in a thread, so that a run's own errors, and Ctrl-C, happen where they do in a local run.
    """
    from flwr.clientapp import ClientApp
    from flwr.serverapp import ServerApp
    from flwr.simulation import run_simulation

    grids: queue.SimpleQueue[Grid | None] = queue.SimpleQueue()
    failures: list[BaseException] = []
    over = threading.Event()

    def main(grid: Any, context: Context) -> None:
        grids.put(grid)
        over.wait()

    server, client = ServerApp(), ClientApp()
    server.main()(main)
    client.query("hello")(hello)
    # Client states in the run's own folder, where resume looks for them; paths from where the user stands.
    client.train("ask")(partial(answer, shelf=shelf, place=place))
    # A killed actor is started again and asked once more: the same seeds, the same bytes.
    resources = {**size, "max_restarts": -1, "max_task_retries": 1}

    def work() -> None:
        try:
            run_simulation(server, client, nodes, backend_config={"client_resources": resources})
        except BaseException as error:
            failures.append(error)
        grids.put(None)

    thread = threading.Thread(target=work, name="flower", daemon=True)
    thread.start()
    try:
        yield Watched(grids.get(), thread, failures)
    finally:
        over.set()
        thread.join(5)
        if (
            thread.is_alive()
        ):  # stopped amid a client's work: Flower's pool waits for an answer of Ray's that will not come
            getattr(
                concurrent.futures.thread, "_threads_queues", {}
            ).clear()  # so that Python's exit does not wait for the pool


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
            raise FedtuneError(
                "F504",
                sentence=f"Flower's simulation engine stopped ({root(*self.failures)})",
                do="run again with FEDTUNE_DEBUG=1 to see its log",
            )
        return self.grid


@contextlib.contextmanager
def ray_cluster(ray: Any, nodes: int, size: dict[str, float]) -> Iterator[None]:
    """A Ray of our own on this machine, no larger than the nodes need; its processes and files are gone
    afterwards."""
    each = int(size["num_cpus"])
    cpus = max(each, min(available_cores(), nodes * each))
    failed, do = (
        "Ray, Flower's simulation engine, did not start",
        "run again with FEDTUNE_DEBUG=1 to see its log",
    )
    with (
        tempfile.TemporaryDirectory(
            prefix="fedtune-ray-", dir="/tmp", ignore_cleanup_errors=True
        ) as folder,  # /tmp: names of sockets end at 107 characters
        begun(ray, failed, do, address="local", num_cpus=cpus, include_dashboard=False, _temp_dir=folder),
    ):
        yield


@contextlib.contextmanager
def hushed(ray_worker: Any) -> Iterator[None]:
    """Flower's log, and Ray's, are for FEDTUNE_DEBUG: what users need to know comes as our events."""
    log, before = logging.getLogger("flwr"), logging.getLogger("flwr").level
    if not os.environ.get("FEDTUNE_DEBUG"):
        log.setLevel(logging.CRITICAL + 1)
        # Ray prints its complaints about dead actors to standard output, whatever log_to_driver says; this is
        # its own switch.
        ray_worker._worker_logs_enabled = False
    try:
        yield
    finally:
        log.setLevel(before)
        ray_worker._worker_logs_enabled = True

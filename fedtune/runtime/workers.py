"""The local transport in several processes: forks of this one, which share its model and data, answer for
clients side by side.

A worker gets a question with what its client remembers, and returns the answer with what the client remembers
now: all else that a client's half does to the shared model stays in the fork. So an answer has the same bytes
whichever process gave it, and the run is the same with any number of workers.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path

import numpy as np
from safetensors.numpy import load, save

from fedtune.config import Recipe
from fedtune.errors import ClientFailed, Paused, Refused
from fedtune.forks import can_fork, die_with_parent, resting
from fedtune.methods import Method
from fedtune.panics import panics_as_errors
from fedtune.runtime.client_half import respond, state_before
from fedtune.runtime.failures import failure_of
from fedtune.runtime.local import local_transport
from fedtune.runtime.protocol import Ask, Link, Reply
from fedtune.runtime.workspace import Workspace
from fedtune.threads import available_cores, threads_for
from fedtune.transforms import build
from fedtune.types import Client, Round

WORTH = 5_000_000  # parameters below which a process costs more than it saves, unless told otherwise
SMALL = 50_000_000  # and above which several processes want too much memory
MOST = 8  # workers, each with its own gradients and activations
KINDS = {kind.__name__: kind for kind in (ClientFailed, Refused, Paused)}


def workers_for(recipe: Recipe, workspace: Workspace, method: Method, asked: int = 0) -> tuple[int, str]:
    """How many processes answer for clients, and why not as many as asked for ("" where they do).

    asked  0: one for each core that a client's `model.threads` leaves idle, where the model is neither too
           small to be worth it nor too large to have several of
    """
    why = hindrance(recipe, workspace, method)
    if why or asked == 1:
        return 1, why if asked > 1 else ""
    fits = WORTH <= workspace.tunable.total <= SMALL
    return min(asked or (min(available_cores(), MOST) if fits else 1), len(workspace.names)), ""


def hindrance(recipe: Recipe, workspace: Workspace, method: Method) -> str:
    """Why forks of this process cannot answer for clients; "" where they can."""
    threads, source = threads_for(recipe.model.threads)
    if threads > 1:
        return f"a client computes with {threads} threads ({source}); set model.threads = 1"
    if workspace.base.device.type != "cpu":
        return f"the model is on {workspace.base.device}"
    return bound_here(recipe, method) or ("" if can_fork() else "this process has threads of its own")


def bound_here(recipe: Recipe, method: Method) -> str:
    """What clients share that another process, of whatever sort, does not have; "" for nothing."""
    if method.capabilities.split is not None:
        return "the middle of the model runs in this process"
    if recipe.method.together > 1:
        return "clients go through the model together (method.train.together)"
    if build(recipe.chain).hides:
        return "secrets of masked sums are kept in this process"
    return ""


@dataclass
class Worker:
    """A process that answers for clients. `pid`: it is a child of this one, whoever began it."""

    pid: int
    pipe: Connection
    ask: Ask | None = None  # what it works on
    since: float = 0.0  # when it was asked, by the monotonic clock


class Workers:
    """A transport. Its processes begin with the first question and end with `close`, or with this process.

    logs   where the traceback of a client's unforeseen error goes
    begin  begins the processes; None: they are `count` forks of this one
    """

    def __init__(
        self,
        link: Link,
        workspace: Workspace,
        logs: Path,
        count: int,
        begin: Callable[[], list[Worker]] | None = None,
    ) -> None:
        self.link, self.workspace, self.logs, self.count = link, workspace, logs, count
        self.begin = begin or self._forks
        self.workers: list[Worker] = []

    def __call__(self, asks: Sequence[Ask]) -> Iterator[Reply]:
        """Replies as they come."""
        if not self.workers:
            self.workers = self.begin()
        left = deque(asks)
        while left or any(worker.ask for worker in self.workers):
            for worker in self.workers:
                if left and not worker.ask:
                    self._give(worker, left.popleft())
            if not self.workers:  # none is alive
                yield from self._here(list(left))
                return
            for pipe in wait([worker.pipe for worker in self.workers if worker.ask]):
                yield self._taken(next(worker for worker in self.workers if worker.pipe is pipe))

    def _forks(self) -> list[Worker]:
        with resting():
            return [self._fork() for _ in range(self.count)]

    def close(self) -> None:
        """No worker outlives the run."""
        for worker in self.workers:
            end(worker)
        self.workers = []

    def _here(self, asks: Sequence[Ask]) -> Iterator[Reply]:
        local = local_transport(self.link, self.workspace.client, self.workspace.done, self.logs)
        yield from local(asks)

    def _fork(self) -> Worker:
        ours, theirs = Pipe()
        sys.stdout.flush()
        pid = os.fork()
        if not pid:
            self._work(theirs)
        theirs.close()
        return Worker(pid, ours)

    def _work(self, pipe: Connection) -> None:
        """A worker's life. It ends without any of the parent's clean-up, whatever happens."""
        try:
            die_with_parent()
            while True:
                answer_one(pipe, self.link, self.workspace, self.logs)
        except (EOFError, OSError):
            pass  # the run is over
        finally:
            os._exit(0)

    def _give(self, worker: Worker, ask: Ask) -> None:
        worker.since = time.monotonic()
        try:
            write_ask(worker.pipe, ask, state_before(self.workspace.client_states.of(ask.client), ask))
            worker.ask = ask
        except OSError:  # it has died; the wait finds that out
            worker.ask = ask

    def _taken(self, worker: Worker) -> Reply:
        """What a worker that can be read has to say. Raises Paused."""
        ask, worker.ask = worker.ask, None
        assert ask is not None
        try:
            reply, client_state = read_reply(worker.pipe, ask.client)
        except (EOFError, OSError):
            end(worker)
            self.workers.remove(worker)
            name = self.workspace.names.get(ask.client, str(ask.client))
            sentence = f"the process that worked for client '{name}' was ended, probably for want of memory"
            do = "give the machine more memory, or use fewer workers (--workers)"
            return Reply(ask.client, failure=ClientFailed("R411", sentence=sentence, do=do))
        if isinstance(reply.failure, Paused):
            raise reply.failure
        if reply.failure is None:
            client = self.workspace.client(ask)
            client.state.clear()
            client.state.update(client_state)
            self.workspace.done(ask, client)
        return replace(reply, seconds=time.monotonic() - worker.since)


def end(worker: Worker) -> None:
    worker.pipe.close()
    try:
        os.kill(worker.pid, signal.SIGKILL)
        os.waitpid(worker.pid, 0)
    except (ProcessLookupError, ChildProcessError):
        pass


def answer_one(pipe: Connection, link: Link, workspace: Workspace, logs: Path) -> None:
    """A worker's half of one question. Raises EOFError when there is no more."""
    ask, client_state = read_ask(pipe)
    name, client = str(ask.client), None
    try:
        with panics_as_errors():
            client = workspace.client_with(ask.client, client_state)
            name = client.name
            reply = respond(link, client, ask)
    except Paused as paused:
        reply = Reply(ask.client, failure=paused)
    except Exception as error:  # whatever it is, it is about this client
        reply = Reply(ask.client, failure=failure_of(error, name, logs))
    write_reply(pipe, reply, client)


def write_ask(pipe: Connection, ask: Ask, client_state: dict[str, np.ndarray]) -> None:
    now = ask.now
    about = {"client": ask.client, "verb": ask.verb, "last": ask.last, "first": ask.first}
    about |= {"round": now.number, "seed": now.seed, "members": now.members}
    for part in (json.dumps(about).encode(), ask.payload, packed(client_state)):
        pipe.send_bytes(part)


def read_ask(pipe: Connection) -> tuple[Ask, dict[str, np.ndarray]]:
    about, payload, client_state = json.loads(pipe.recv_bytes()), pipe.recv_bytes(), load(pipe.recv_bytes())
    now = Round(about["round"], about["seed"], tuple(about["members"]))
    return Ask(about["client"], about["verb"], now, payload, about["last"], about["first"]), client_state


def write_reply(pipe: Connection, reply: Reply, client: Client | None) -> None:
    error = reply.failure
    failed = (type(error).__name__, error.code, error.found, error.expected, error.do) if error else ()
    client_state = client.state if client and not error else {}
    for part in (json.dumps([reply.said, *failed]).encode(), reply.payload, packed(client_state)):
        pipe.send_bytes(part)


def read_reply(pipe: Connection, client: int) -> tuple[Reply, dict[str, np.ndarray]]:
    (said, *failed), payload, client_state = (
        json.loads(pipe.recv_bytes()),
        pipe.recv_bytes(),
        load(pipe.recv_bytes()),
    )
    failure = KINDS[failed[0]](*failed[1:]) if failed else None
    return Reply(client, payload, failure, said), client_state


def packed(client_state: dict[str, np.ndarray]) -> bytes:
    content: bytes = save({name: np.asarray(value, order="C") for name, value in client_state.items()})
    return content

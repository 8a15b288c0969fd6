"""Jobs side by side in forks of this process, which share its memory as it is; their results come back as
JSON.

A fork of a process with more than one thread may wait for a lock that nobody holds any more, and one of a
process that has used a GPU cannot use it: where there is any doubt, the jobs are done here, one after the
other. So a job's result must not depend on where it is done.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import selectors
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

Job = Callable[[], Any]  # -> what JSON can say
DEATH_OF_PARENT = 1  # PR_SET_PDEATHSIG


class Helper(Protocol):
    """Something with a thread of its own that can end it and begin it again."""

    thread: threading.Thread

    def rest(self) -> None: ...

    def go_on(self) -> None: ...


HELPERS: list[Helper] = []  # whose threads do not stand in the way of a fork


class Forks:
    """Jobs that are done from now on, in this order, by at most `most` forks; `results` waits for them.

    first  is done once in each fork, before its jobs
    """

    def __init__(self, jobs: Sequence[Job], most: int, first: Callable[[], None] = lambda: None) -> None:
        self.jobs, self.pipes, self.children = list(jobs), list[int](), list[int]()
        count = min(most, len(self.jobs))
        if count < 2 or len(self.jobs) > 255:
            return
        with resting():
            if can_fork():
                self._fork(count, first)

    def _fork(self, count: int, first: Callable[[], None]) -> None:
        taken, to_take = os.pipe()
        os.write(to_take, bytes(range(len(self.jobs))))  # whoever is free takes the next number
        os.close(to_take)
        for _ in range(count):
            got, tell = os.pipe()
            child = os.fork()
            if not child:
                self._work(taken, tell, first)
            os.close(tell)
            self.pipes.append(got)
            self.children.append(child)
        os.close(taken)

    def _work(self, taken: int, tell: int, first: Callable[[], None]) -> None:
        """A fork's life. It ends without any of the parent's clean-up, whatever happens."""
        try:
            die_with_parent()
            first()
            while number := os.read(taken, 1):
                line = json.dumps([number[0], self.jobs[number[0]]()]) + "\n"
                with open(tell, "w", encoding="utf-8", closefd=False) as out:
                    out.write(line)
        finally:
            os._exit(0)

    def results(self) -> Iterator[tuple[int, Any]]:
        """(number of the job, its result), as they are done. What no fork has done, since there is none or it
        died, is done here."""
        left = set(range(len(self.jobs)))
        try:
            for number, result in self._told():
                left.discard(number)
                yield number, result
        finally:
            self.end()
        for number in sorted(left):
            yield number, self.jobs[number]()

    def _told(self) -> Iterator[tuple[int, Any]]:
        """Whole lines of all pipes, until all are closed."""
        with selectors.DefaultSelector() as selector:
            rest = dict.fromkeys(self.pipes, b"")
            for pipe in rest:
                selector.register(pipe, selectors.EVENT_READ)
            while selector.get_map():
                for key, _ in selector.select():
                    piece = os.read(key.fd, 1 << 16)
                    if not piece:
                        selector.unregister(key.fd)
                    *lines, rest[key.fd] = (rest[key.fd] + piece).split(b"\n")
                    for line in lines:
                        number, result = json.loads(line)
                        yield number, result

    def end(self) -> None:
        """No fork outlives its work here."""
        for child in self.children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(child, 0)
        for pipe in self.pipes:
            os.close(pipe)
        self.children, self.pipes = [], []


@contextlib.contextmanager
def resting() -> Iterator[None]:
    """No helper's thread is at work within the block, as far as they end in time."""
    helpers = list(HELPERS)
    for helper in helpers:
        helper.rest()
    try:
        yield
    finally:
        for helper in helpers:
            helper.go_on()


def can_fork() -> bool:
    """Linux, no GPU in use, and no thread of Python's beside this one and those of helpers, which rest while
    the process forks."""
    helping = {helper.thread for helper in HELPERS}
    others = [thread for thread in threading.enumerate() if thread not in helping]
    return sys.platform == "linux" and len(others) == 1 and not uses_gpu()


def uses_gpu() -> bool:
    """Whether this process has begun to use CUDA; torch is not loaded to ask."""
    torch = sys.modules.get("torch")
    return torch is not None and torch.cuda.is_initialized()


def die_with_parent() -> None:
    """The kernel ends this process when its parent dies, however it dies."""
    parent = os.getppid()
    ctypes.CDLL(None).prctl(DEATH_OF_PARENT, signal.SIGKILL)
    if parent == 1:
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle

"""How far a long piece of work is: said by the code that does it, however deep, heard by who asked for it.

Where nobody listens, saying costs a look at a variable. What is said depends on the clock and is for those
who look now: nothing is decided by it, and no run writes it down.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass

from fedtune.errors import FedtuneError
from fedtune.events import Event, Progress

EVERY = 0.1  # seconds between two events of one kind of work


@dataclass
class Ear:
    """Who listens in this process; a fork of it speaks to nobody."""

    tell: Callable[[Event], None]
    every: float
    process: int
    what: str = ""
    last: float = 0.0


EAR: ContextVar[Ear | None] = ContextVar("ear", default=None)


@contextmanager
def heard_by(tell: Callable[[Event], None], every: float = EVERY) -> Iterator[None]:
    """Progress within the block, in this thread, goes to `tell`, at most once in `every` seconds for each
    kind of work."""
    token = EAR.set(Ear(tell, every, os.getpid()))
    try:
        yield
    finally:
        EAR.reset(token)


def say(what: str, done: int = 0, total: int = 0, loss: float | None = None) -> None:
    """`what` is going on now, and has come so far: `done` of `total` (0: nobody knows) steps, texts or
    batches, with the training loss of the last one in nats."""
    ear = EAR.get()
    if ear is None:
        return
    now = time.monotonic()
    if (what == ear.what and now < ear.last + ear.every) or ear.process != os.getpid():
        return
    ear.what, ear.last = what, now
    with suppress(FedtuneError, OSError):  # work does not fail because of who watches it
        ear.tell(Progress(what, done, total, loss))

"""Slots for streams, and a bounded queue before them."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

from fedtune.exchange.grpc_errors import NoRoom

LOOK = 0.25  # seconds between looks whether who waits is still there


class Turns:
    """So many streams of a kind at once, so many more that wait, and the rest comes again later."""

    def __init__(self, slots: int, waiting: int, seconds: float, what: str) -> None:
        self.what, self.slots, self.waiting, self.seconds = what, slots, waiting, seconds
        self._free, self._places = threading.Semaphore(slots), threading.Semaphore(slots + waiting)

    @contextlib.contextmanager
    def turn(self, alive: Callable[[], bool]) -> Iterator[None]:
        """A slot, as soon as there is one. Raises NoRoom where too many wait, it took too long, or nobody is
        there any more."""
        if not self._places.acquire(blocking=False):
            raise NoRoom(f"{self.waiting} {self.what} that wait for a place", "fewer", 2.0)
        try:
            end = time.monotonic() + self.seconds
            while not self._free.acquire(timeout=LOOK):
                if time.monotonic() > end or not alive():
                    raise NoRoom(
                        f"no place among {self.slots} {self.what} for {self.seconds:g} s", "one to end", 0.5
                    )
            try:
                yield
            finally:
                self._free.release()
        finally:
            self._places.release()

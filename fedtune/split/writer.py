"""Answers are coded, digested and cut into frames beside the thread that computes, which meanwhile goes on.

One thread, so answers leave in the order in which they were computed. On a GPU it works on a stream of its
own, which waits for the pass that made the result and for no later one."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch

ROOM = 2  # results that wait or are being written, before computing waits


class Writer:
    """`later` is called by the thread that computes; `stop` ends when all answers are written."""

    def __init__(self, room: int = ROOM) -> None:
        self.room = threading.BoundedSemaphore(room)
        self.pool = ThreadPoolExecutor(1, "split-answers")
        self.streams: dict[torch.device, torch.cuda.Stream] = {}

    def later(self, result: torch.Tensor | None, work: Callable[[], None]) -> None:
        """Do `work`, which raises nothing, after all work before it; its result may not be computed yet."""
        ready = None
        if result is not None and result.is_cuda:
            ready = torch.cuda.current_stream(result.device).record_event()

        def written() -> None:
            try:
                with self.beside(result, ready):
                    work()
            finally:
                self.room.release()

        self.room.acquire()
        self.pool.submit(written)

    @contextmanager
    def beside(self, result: torch.Tensor | None, ready: torch.cuda.Event | None) -> Iterator[None]:
        """On a GPU, a stream of this writer's own, in which the result is there."""
        if result is None or ready is None:
            yield
            return
        if result.device not in self.streams:
            self.streams[result.device] = torch.cuda.Stream(result.device)
        stream = self.streams[result.device]
        with torch.cuda.stream(stream):
            stream.wait_event(ready)
            yield
            result.record_stream(
                stream
            )  # its memory is not given to anybody before the stream has come so far

    def stop(self) -> None:
        self.pool.shutdown()

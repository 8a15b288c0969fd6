"""Replies as they come from a transport: in the order in which they are added, and how long each let wait."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence

from fedtune.runtime.protocol import Reply


def timed(replies: Iterable[Reply], waited: Callable[[float], None]) -> Iterator[Reply]:
    """The same, and `waited` is told the seconds until each came."""
    source = iter(replies)
    while True:
        began = time.monotonic()
        reply = next(source, None)
        waited(time.monotonic() - began)
        if reply is None:
            return
        yield reply


def ascending(replies: Iterable[Reply], members: Sequence[int]) -> Iterator[Reply]:
    """Replies by ascending id, whatever order they came in: float sums depend on order, results must not."""
    waiting: dict[int, Reply] = {}
    order = iter(members)
    wanted = next(order, None)
    for reply in replies:
        waiting[reply.client] = reply
        while wanted in waiting:
            yield waiting.pop(wanted)
            wanted = next(order, None)

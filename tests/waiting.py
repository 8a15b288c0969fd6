"""Waiting for other processes: for a condition and never for a fixed time, with a deadline that only a hang
can miss."""

from __future__ import annotations

import os
import random
import socket
import time
from collections.abc import Callable
from typing import Any

import pytest

# seconds: beside twelve busy processes two minutes were not enough, and who is not kept waiting loses nothing
PATIENCE = 300.0

LONG = 400.0  # seconds that a whole run of real processes may take, faults and a busy machine included


def wait_for(done: Callable[[], Any], what: str, seconds: float = PATIENCE, every: float = 0.02) -> None:
    """Until a condition holds."""
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, f"{what}: not within {seconds:.0f} s"
        time.sleep(every)


def require_ended(pids: list[int]) -> None:
    """There were such processes, and none is alive."""
    assert pids
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def free_ports(count: int) -> list[int]:
    """Ports of loopback that stay free until a server takes them, and while it is started again: the system
    gives outgoing calls none below 32768.

    Drawn anew in every process, so that test workers and test runs at the same time do not meet.
    """
    found: list[int] = []
    draw = random.SystemRandom()
    while len(found) < count:
        port = draw.randrange(10_000, 32_768)
        try:
            socket.create_server(("127.0.0.1", port)).close()
        except OSError:
            continue
        if port not in found:
            found.append(port)
    return found

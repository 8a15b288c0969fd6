"""What a site's worker and the site's own training script say to one another, over a Unix socket of their
machine: a line of JSON, and tensors as safetensors behind it.

No pickle. Each end says beforehand how much it takes and how long it waits, and allocates nothing that is
larger: a line is counted while it comes, tensors by the size that the line names.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

PLACE = "FEDTUNE_TRAINER"  # in a script's environment: the path of the worker's socket
TOKEN = "FEDTUNE_TRAINER_TOKEN"  # and the word by which the worker knows the script that the site started
LINE = 8 << 20  # bytes of a question: names of tensors, and what the worker's model says
WORD = 1 << 16  # bytes of an answer's line
MORE = 1 << 20  # bytes of names and shapes beside tensors
PIECE = 1 << 18  # bytes that are read at once


class Garbled(ValueError):
    """The other end says something that is no message."""


class Wire:
    """One end of a connection. Both calls raise TimeoutError after `seconds` (None: never), EOFError or
    OSError where the other end has gone, and `receive` Garbled for anything but a message."""

    def __init__(self, call: socket.socket) -> None:
        self.call = call

    def send(
        self,
        record: Mapping[str, Any],
        tensors: Mapping[str, np.ndarray] | None = None,
        seconds: float | None = None,
    ) -> None:
        body = (
            save({name: np.ascontiguousarray(value) for name, value in tensors.items()}) if tensors else b""
        )
        if seconds is not None and seconds <= 0:
            raise TimeoutError
        self.call.settimeout(seconds)
        self.call.sendall(json.dumps({**record, "bytes": len(body)}).encode() + b"\n")
        self.call.sendall(body)

    def receive(
        self, line: int, most: int, seconds: float | None = None
    ) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """A record of at most so many bytes, and its tensors, of at most `most`. What comes behind them is
        Garbled, too: nobody speaks before being asked."""
        end = None if seconds is None else time.monotonic() + seconds
        head = bytearray()
        while b"\n" not in head:
            if len(head) > line:
                raise Garbled(f"a line of more than {line:,} bytes")
            head += self.piece(PIECE, end)
        words, _, rest = bytes(head).partition(b"\n")
        if len(words) > line:
            raise Garbled(f"a line of more than {line:,} bytes")
        record, size = read_record(words)
        if not 0 <= size <= most:
            raise Garbled(f"tensors of {size:,} bytes, where at most {most:,} can be")
        if len(rest) > size:
            raise Garbled("more than one answer")
        body = bytearray(rest)
        while len(body) < size:
            body += self.piece(min(PIECE, size - len(body)), end)
        return record, read_tensors(bytes(body))

    def piece(self, most: int, end: float | None) -> bytes:
        left = None if end is None else end - time.monotonic()
        if left is not None and left <= 0:
            raise TimeoutError
        self.call.settimeout(left)
        found = self.call.recv(most)
        if not found:
            raise EOFError
        return found

    def close(self) -> None:
        self.call.close()


def read_record(words: bytes) -> tuple[dict[str, Any], int]:
    """A record, and the size of what follows it. Raises Garbled."""
    try:
        record = json.loads(words)
    except (ValueError, RecursionError) as error:
        raise Garbled(f"a line that is no JSON ({type(error).__name__})") from None
    if not isinstance(record, dict) or type(size := record.pop("bytes", None)) is not int:
        raise Garbled("a record without a size")
    return record, size


def read_tensors(body: bytes) -> dict[str, np.ndarray]:
    """Raises Garbled."""
    try:
        return load(body) if body else {}
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise Garbled(f"tensors that cannot be read ({str(error)[:200]})") from None

"""What a site's worker and the site's own training script say to one another, over a Unix socket of their
machine: a line of JSON, and tensors as safetensors behind it. No pickle; nothing is allocated before its size
is known."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, BinaryIO

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

PLACE = (
    "FEDTUNE_TRAINER"  # in the environment of a script that fedtune client has started: the worker's socket
)
LINE = 4 << 20  # bytes of a record


def send(file: BinaryIO, record: Mapping[str, Any], tensors: Mapping[str, np.ndarray] | None = None) -> None:
    body = save({name: np.ascontiguousarray(value) for name, value in tensors.items()}) if tensors else b""
    file.write(json.dumps({**record, "bytes": len(body)}).encode() + b"\n")
    file.write(body)
    file.flush()


def receive(file: BinaryIO, most: int) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """A record and its tensors, of at most so many bytes. Raises EOFError where the other side has gone, and
    ValueError for anything but that."""
    line = file.readline(LINE)
    if not line:
        raise EOFError
    if not line.endswith(b"\n"):
        raise ValueError("a record that is not a line")
    record = json.loads(line)
    if not isinstance(record, dict) or not isinstance(size := record.pop("bytes", None), int):
        raise ValueError("a record without a size")
    if not 0 <= size <= most:
        raise ValueError(f"tensors of {size:,} bytes, where at most {most:,} can be")
    body = file.read(size)
    if len(body) < size:
        raise EOFError
    try:
        return record, load(body) if body else {}
    except SafetensorError as error:
        raise ValueError(f"tensors that cannot be read ({error})") from error

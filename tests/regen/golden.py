"""Messages of today, as hex: every later version must read them. An existing file is never rewritten by a
changed encoder.

One file a message: what `tests/golden/` holds is read from there if it is there, so that regenerating cannot
break the promise.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fedtune.schema import Schema
from fedtune.types import Update
from fedtune.wire import Header, encode, encode_changes, encode_state
from tests.wire.fuzz import named

ROOT = Path(__file__).resolve().parents[2]
HEADER = Header(run="golden", round=7, client=3, verb="train", base="b" * 64)


def values() -> Update:
    """Two tensors with numbers that float32 holds exactly."""
    return Update.of(
        {"b": np.float32([[0.5, -1.25], [3.0, 0.0]]), "a": np.float32([1e-3, -2.0])},
        12.0,
        {"loss": 0.75, "seconds": 2.0},
    )


def levels() -> Update:
    """Levels with zeros, magnitudes above 1 and a gap of more than 255, one scale a tensor."""
    tensors = {"a": np.zeros(600, np.int8), "b": np.int8([[1, 0, -1], [0, 0, 3]])}
    tensors["a"][[2, 500]] = 1, -2
    return Update(tensors, 5.0, {"loss": 2.5}, {"a": np.float32(0.125), "b": np.float32(3 * 2.0**-30)})


def steep() -> Update:
    """Few levels above 1 among many that are not: planes, the second of them as gaps."""
    wave = np.arange(90) % 3 - 1
    wave[[4, 50]] = 2, -9
    return Update({"w": np.int8(wave).reshape(9, 10)}, 2.0, {}, {"w": np.float32(0.5)})


def accumulators() -> dict[str, np.ndarray]:
    """A state of whole numbers whose second is as the receiver has it: 0."""
    return {"pool": np.int32([-(2**20), 0, 5])}


def messages() -> dict[str, bytes]:
    seeds = {"seeds": np.int64([-1, 2**40]), "w": np.float32([0.5])}
    return {
        "values": encode(values(), HEADER),
        "levels": encode(levels(), HEADER),
        "ring": encode(Update({"w": np.uint32([[0, 1], [2**31, 2**32 - 1]])}, 1.0), HEADER),
        "ring64": encode(Update({"w": np.uint64([0, 1, 2**63, 2**64 - 1])}, 1.0), HEADER),
        "state": named(encode_state(seeds, HEADER), Schema.of(seeds)),
        "changes": encode_changes(accumulators(), {"pool": np.bool_([True, False, True])}, HEADER),
    }


def generate() -> dict[str, str]:
    files = {f"tests/golden/message-v1-{name}.hex": data for name, data in messages().items()}
    files["tests/golden/message-v2-levels.hex"] = encode(steep(), HEADER)
    return {path: kept(path) or data.hex() + "\n" for path, data in files.items()}


def kept(path: str) -> str:
    file = ROOT / path
    return file.read_text(encoding="ascii") if file.exists() else ""

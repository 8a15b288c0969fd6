"""What the benchmark needs to know of a contender, and no user needs: when local training begins, faults on purpose, and
the end. Lines that call it are marked `# probe` in the contenders, and are not counted as a user's.

PEERS_LOG    a file of JSON lines
PEERS_FAULT  nan:CLIENT or raise:CLIENT, from round 2 on
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

KIND, _, WHO = os.environ.get("PEERS_FAULT", "").partition(":")


def note(event: str, **more: Any) -> None:
    with open(os.environ["PEERS_LOG"], "a") as file:
        file.write(json.dumps({"event": event, "at": time.time(), **more}) + "\n")


def begin(client: int, number: int) -> None:
    """Before a client's local training of a round; the rounds count from 1."""
    note("train", client=client, round=number)
    if KIND == "raise" and int(WHO) == client and number >= 2:
        raise RuntimeError(f"client {client} fails on purpose in round {number}")


def spoiled(state: Mapping[str, Any], client: int, number: int) -> Mapping[str, Any]:
    """A client's answer, as it is or all NaN."""
    if KIND == "nan" and int(WHO) == client and number >= 2:
        return {name: value * float("nan") for name, value in state.items()}
    return state


def end(state: Mapping[str, Any], accuracy: float) -> None:
    """The final numbers: a hash of them by name, and whether they are finite."""
    values = [np.ascontiguousarray(np.asarray(state[name]), np.float32) for name in sorted(state)]
    digest = hashlib.sha256(b"".join(value.tobytes() for value in values)).hexdigest()
    note("end", accuracy=accuracy, digest=digest, finite=all(bool(np.isfinite(v).all()) for v in values))

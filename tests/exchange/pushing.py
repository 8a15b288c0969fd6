"""Updates as tests push them, and what was said of them."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import grpc
import pytest

from fedtune.exchange.events import UpdateAccepted
from fedtune.exchange.grpc_errors import understood
from fedtune.exchange.limits import CHUNK
from fedtune.wire.v1 import exchange_pb2 as pb
from tests.exchange.federation import Federation

UPDATE = random.Random(3).randbytes(3 * CHUNK + 17)
SMALL = b"four" * 10


def split(data: bytes) -> list[pb.Piece]:
    return [pb.Piece(data=data[at : at + CHUNK]) for at in range(0, len(data), CHUNK)]


def code_of(call: Callable[[], Any]) -> str:
    """The code that a call by hand is refused with."""
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return understood(caught.value, "here")[0].code


def events(federation: Federation) -> list[UpdateAccepted]:
    return [event for event in federation.told if isinstance(event, UpdateAccepted)]

"""Updates as tests push them, and what was said of them."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import grpc
import pytest

from fedtune.exchange.events import UpdateAccepted
from fedtune.exchange.grpc_errors import TRAILER
from fedtune.exchange.limits import CHUNK
from fedtune.wire.v1 import exchange_pb2 as pb
from tests.exchange.federation import Federation

UPDATE = random.Random(3).randbytes(3 * CHUNK + 17)
SMALL = b"four" * 10


def split(data: bytes) -> list[pb.Piece]:
    return [pb.Piece(data=data[at : at + CHUNK]) for at in range(0, len(data), CHUNK)]


def code_of(call: Callable[[], Any]) -> str:
    """The code that a call by hand is refused with, as the coordinator said it: not what a client makes of a call that
    ended without a reason."""
    with pytest.raises(grpc.RpcError) as caught:
        call()
    parts = [value for key, value in caught.value.trailing_metadata() or () if key == TRAILER]
    assert parts, caught.value
    return str(pb.Refusal.FromString(parts[0]).code)


def events(federation: Federation) -> list[UpdateAccepted]:
    return [event for event in federation.told if isinstance(event, UpdateAccepted)]


class Ended(grpc.RpcError):  # type: ignore[misc]
    """A call that ended, as both ends see it: the server's context, and what is raised at the client."""

    def __init__(self, status: Any = None, details: str | None = None, metadata: Any = None) -> None:
        self.said = status, details, metadata

    def set_trailing_metadata(self, metadata: Any) -> None:
        self.said = *self.said[:2], metadata

    def abort(self, status: Any, details: str) -> None:
        self.said = status, details, self.said[2]
        raise self

    def code(self) -> Any:
        return self.said[0]

    def details(self) -> str | None:
        return self.said[1]

    def trailing_metadata(self) -> Any:
        return self.said[2]

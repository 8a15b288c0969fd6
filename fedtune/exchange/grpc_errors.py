"""Errors of the catalogue across gRPC, both ways: a status, one sentence, and the sentence's parts in the
trailing metadata."""

from __future__ import annotations

from typing import Any, NoReturn

import grpc
from google.protobuf.message import DecodeError

from fedtune.errors import CATALOGUE, FedtuneError, Refused, framed
from fedtune.proxies import proxy_hint
from fedtune.wire.v1 import exchange_pb2 as pb

TRAILER = "fedtune-error-bin"
S = grpc.StatusCode
STATUS = {
    "E803": S.NOT_FOUND,
    "E804": S.RESOURCE_EXHAUSTED,
    "E805": S.ALREADY_EXISTS,
    "E806": S.FAILED_PRECONDITION,
    "E807": S.DATA_LOSS,
    "R404": S.RESOURCE_EXHAUSTED,
    "W604": S.FAILED_PRECONDITION,
    "W605": S.FAILED_PRECONDITION,
    "W606": S.INVALID_ARGUMENT,
    "T702": S.INTERNAL,
}
BY_LETTER = {"T": S.PERMISSION_DENIED, "W": S.INVALID_ARGUMENT, "E": S.INVALID_ARGUMENT}
AGAIN = {
    S.UNAVAILABLE,
    S.RESOURCE_EXHAUSTED,
    S.CANCELLED,
    S.DEADLINE_EXCEEDED,
    S.ABORTED,
}  # may work later, unchanged


class NoRoom(FedtuneError):
    """The exchange cannot take it now; come again after so many seconds."""

    def __init__(self, found: str, expected: str, retry_after: float) -> None:
        super().__init__("E804", found, expected, f"it is tried again in {retry_after:.1f} s")
        self.retry_after = retry_after


def abort(context: Any, error: FedtuneError) -> NoReturn:
    """End a call with an error of the catalogue."""
    retry_after = getattr(error, "retry_after", 30.0 if error.code in ("E804", "R404", "T702") else 0.0)
    parts = pb.Refusal(
        code=error.code,
        found=error.found[:500],
        expected=error.expected[:500],
        do=error.do[:500],
        retry_after=retry_after,
    )
    if error.code == "R404":  # what the coordinator's disk is called is nobody else's business
        parts.code, parts.found, parts.expected, parts.do = (
            "E804",
            "the coordinator's disk has no room for an update",
            "",
            "it is tried again later",
        )
    context.set_trailing_metadata(((TRAILER, parts.SerializeToString()),))
    status = STATUS.get(error.code) or BY_LETTER.get(error.code[0], S.INTERNAL)
    context.abort(status, framed(parts.code, parts.found, parts.expected, parts.do)[:1000])
    raise AssertionError("abort does not return")


def understood(error: grpc.RpcError, address: str) -> tuple[FedtuneError, float | None]:
    """A failed call as an error of the catalogue, and after how many seconds to try again: None never, 0 by
    the caller's own pace."""
    for key, value in error.trailing_metadata() or ():
        if key == TRAILER:
            try:
                parts = pb.Refusal.FromString(value)
            except DecodeError:
                break
            if parts.code in CATALOGUE:
                kind = Refused if parts.code.startswith("W") else FedtuneError
                return kind(
                    parts.code, parts.found, parts.expected, parts.do.rstrip(".")
                ), parts.retry_after or None
    status, details = error.code(), (error.details() or "")[:200]
    if status is S.RESOURCE_EXHAUSTED:
        return FedtuneError(
            "E804",
            sentence=f"the coordinator at {address} takes no more calls at the moment",
            do="it is tried again later",
        ), 0.0
    if status in AGAIN:
        return FedtuneError(
            "E801",
            sentence=f"no answer from {address} ({status.name}: {details})",
            do=f"check address and network, and that the coordinator runs{proxy_hint(address)}",
        ), 0.0
    return FedtuneError(
        "E808",
        sentence=f"{address} ended a call with {status.name} ({details})",
        do="install the same version of fedtune on both sides",
    ), None

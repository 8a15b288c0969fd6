"""What goes wrong at the coordinator, as the client is told of it: the same error, and when to come again."""

from __future__ import annotations

from typing import Any

import grpc
import pytest

from fedtune.errors import CATALOGUE, FedtuneError, Refused
from fedtune.exchange.grpc_errors import TRAILER, NoRoom, abort, understood
from fedtune.wire.v1 import exchange_pb2 as pb
from tests.exchange.pushing import Ended

S = grpc.StatusCode


def ended(error: FedtuneError) -> Ended:
    with pytest.raises(Ended) as caught:
        abort(Ended(), error)
    return caught.value


STATUS = {
    "E803": S.NOT_FOUND,
    "E804": S.RESOURCE_EXHAUSTED,
    "E805": S.ALREADY_EXISTS,
    "E806": S.FAILED_PRECONDITION,
    "E807": S.DATA_LOSS,
    "E808": S.INVALID_ARGUMENT,
    "W601": S.INVALID_ARGUMENT,
    "W604": S.FAILED_PRECONDITION,
    "W605": S.FAILED_PRECONDITION,
    "W606": S.INVALID_ARGUMENT,
    "T702": S.INTERNAL,
    "T706": S.PERMISSION_DENIED,
    "R402": S.INTERNAL,
}


@pytest.mark.parametrize("code", STATUS)
def test_an_error_is_the_same_at_both_ends(code: str) -> None:
    kind = Refused if code.startswith("W") else FedtuneError
    error = kind(code, "this", "that", "do so")
    call = ended(error)
    got, wait = understood(call, "here")
    assert type(got) is kind and str(got) == str(error) == call.details()
    assert (got.code, got.found, got.expected, got.do) == (code, "this", "that", "do so")
    assert call.code() is STATUS[code]
    assert wait == (30.0 if code in ("E804", "T702") else None)  # else it does not help to come again


def test_who_is_told_when_to_come_again_is_told_so_at_the_other_end() -> None:
    error = NoRoom("this", "that", 2.5)
    assert (error.code, error.retry_after) == ("E804", 2.5) and "in 2.5 s" in error.do
    got, wait = understood(ended(error), "here")
    assert (got.code, got.found, wait) == ("E804", "this", 2.5)


def test_what_the_coordinators_disk_is_called_is_nobody_elses_business() -> None:
    call = ended(FedtuneError("R404", sentence="cannot write '/srv/secret'", do="free /srv/secret"))
    got, wait = understood(call, "here")
    assert (got.code, wait, call.code()) == ("E804", 30.0, S.RESOURCE_EXHAUSTED)
    assert "disk has no room" in got.found and got.expected == "" and "tried again" in got.do
    assert "secret" not in f"{call.details()}{call.trailing_metadata()}"


def test_a_long_error_fits_into_a_calls_metadata() -> None:
    long = "x" * 9000
    call = ended(FedtuneError("E803", long, long, long))
    got, _ = understood(call, "here")
    assert [len(part) for part in (got.found, got.expected, got.do)] == [500] * 3
    assert len(call.details() or "") == 1000 and len(call.trailing_metadata()[0][1]) < 2000


def test_abort_never_returns() -> None:
    class Deaf(Ended):
        def abort(self, status: Any, details: str) -> None:
            pass

    with pytest.raises(AssertionError):
        abort(Deaf(), FedtuneError("E803", "this", "that", "do so"))


@pytest.mark.parametrize("status", [one for one in S if one is not S.OK])
def test_a_call_that_ended_without_our_words_is_tried_again_where_that_may_help(
    status: grpc.StatusCode,
) -> None:
    got, wait = understood(Ended(status, "y" * 300), "fed.example.org:9443")
    again = {S.UNAVAILABLE, S.CANCELLED, S.DEADLINE_EXCEEDED, S.ABORTED}
    code = "E804" if status is S.RESOURCE_EXHAUSTED else "E801" if status in again else "E808"
    assert got.code == code and wait == (None if code == "E808" else 0.0)
    assert "fed.example.org:9443" in got.found and ("y" * 201 not in got.found)
    assert code == "E804" or (status.name in got.found and "y" * 200 in got.found)


def test_words_that_are_none_of_ours_are_not_believed() -> None:
    known = pb.Refusal(code="E803", found="this").SerializeToString()
    unknown = pb.Refusal(code="E999", found="this").SerializeToString()
    for metadata in ([(TRAILER, b"\xff")], [("other", known)], [(TRAILER, unknown)], [], None):
        got, wait = understood(Ended(S.UNAVAILABLE, None, metadata), "here")
        assert (got.code, wait) == ("E801", 0.0)
    got, _ = understood(Ended(S.UNAVAILABLE, None, [("other", b"\xff"), (TRAILER, known)]), "here")
    assert (got.code, got.found) == ("E803", "this") and "E999" not in CATALOGUE

"""A client alone: when it tries again, and what it makes of a refusal."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest

from fedtune.errors import FedtuneError, Refused
from fedtune.exchange import ExchangeClient
from fedtune.exchange import client as module
from fedtune.exchange.grpc_errors import NoRoom, abort
from fedtune.forms import MemberName, Sha256
from fedtune.trust import Identity, Ticket, load, receipt
from fedtune.trust.authority import Authority, create
from fedtune.trust.certificates import utc_now
from fedtune.wire.v1 import exchange_pb2 as pb
from tests.exchange.pushing import Ended

S = grpc.StatusCode


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    made = create(tmp_path_factory.mktemp("keys") / "keys", "hospitals", ["localhost"], 30)
    made.issue("site-a", 30)
    return made


class Clock:
    """Time that passes by sleeping only; of each draw of a pause, its end is taken."""

    def __init__(self) -> None:
        self.now, self.pauses, self.drawn = 1000.0, list[float](), list[tuple[float, float]]()

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds

    def uniform(self, low: float, high: float) -> float:
        self.drawn.append((low, high))
        return high


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(module, "time", made)
    monkeypatch.setattr(module, "JITTER", made)
    monkeypatch.setattr(module, "reason", lambda identity, address: None)
    return made


@pytest.fixture
def client(clock: Clock, authority: Authority, tmp_path: Path) -> Iterator[ExchangeClient]:
    """Nobody is at its address."""
    made = ExchangeClient("localhost:1", load(authority.place("site-a")), tmp_path, 100.0, 10)
    yield made
    made.close()


def said(error: FedtuneError) -> Ended:
    with pytest.raises(Ended) as caught:
        abort(Ended(), error)
    return caught.value


def fails(*errors: Exception) -> Any:
    """A call that ends with these, one after the other, and then works."""
    left = list(errors)

    def call(*arguments: Any) -> str:
        if left:
            raise left.pop(0)
        return "done"

    return call


AWAY = Ended(S.UNAVAILABLE, "away")


def test_a_client_keeps_its_folders_apart_and_its_bounds(client: ExchangeClient, tmp_path: Path) -> None:
    assert (client.outbox.folder, client.cache.folder, client.cache.cap) == (
        tmp_path / "spool",
        tmp_path / "cache",
        10,
    )
    assert (client.patience, client.address) == (100.0, "localhost:1")


def test_pauses_double_up_to_half_a_minute(client: ExchangeClient, clock: Clock) -> None:
    client.patience = 1e6
    assert client._trying(fails(*[AWAY] * 10)) == "done"
    assert clock.drawn == [(0, min(30.0, 0.25 * 2**turn)) for turn in range(10)]
    assert clock.pauses == [high for _, high in clock.drawn]


def test_the_pace_that_the_coordinator_names_is_kept(client: ExchangeClient, clock: Clock) -> None:
    assert client._trying(fails(said(NoRoom("", "", 8.0)), AWAY, said(NoRoom("", "", 8.0)), AWAY)) == "done"
    assert clock.drawn == [(0.75, 1.5), (0, 0.25), (0.75, 1.5), (0, 0.5)]
    assert clock.pauses == [12.0, 0.25, 12.0, 0.5]


def test_what_no_waiting_helps_is_raised_at_once(client: ExchangeClient, clock: Clock) -> None:
    for error, code in ((said(Refused("W604", "x", "y", "z")), "W604"), (Ended(S.UNIMPLEMENTED, ""), "E808")):
        with pytest.raises(FedtuneError, match=f"^{code}"):
            client._trying(fails(error))
    assert not clock.pauses


def test_patience_ends_and_the_last_error_is_raised(client: ExchangeClient, clock: Clock) -> None:
    """The last pause is cut, so that the last try comes when patience ends."""
    with pytest.raises(FedtuneError, match=r"E801.*localhost:1"):
        client._trying(fails(*[AWAY] * 99))
    assert sum(clock.pauses[:-1]) == pytest.approx(100) and clock.pauses[-1] == 0.05


def test_what_moves_gives_new_patience(client: ExchangeClient, clock: Clock) -> None:
    tries: list[float] = []

    def call() -> str:
        tries.append(clock.now)
        if len(tries) > 140:
            return "done"
        client._moved = clock.now if len(tries) % 5 == 0 else client._moved
        raise AWAY

    assert client._trying(call) == "done" and clock.now > 1000 + 3 * client.patience / 2
    assert max(high for _, high in clock.drawn) == 0.25 * 2**4  # and a new backoff


def test_the_reason_for_no_connection_is_looked_for_once(
    client: ExchangeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[tuple[Identity, str]] = []

    def reason(identity: Identity, address: str) -> FedtuneError | None:
        looked.append((identity, address))
        return why

    monkeypatch.setattr(module, "reason", reason)
    why: FedtuneError | None = None
    assert client._trying(fails(Ended(S.ABORTED, ""), AWAY, AWAY)) == "done"
    assert looked == [(client.identity, "localhost:1")]
    why = FedtuneError("T704", "x", "y", "z")
    with pytest.raises(FedtuneError, match=r"^T704"):
        client._trying(fails(AWAY))


# --- answers ---

STATE = b"a state"
TICKET = Ticket(
    "run-1",
    3,
    MemberName("site-a"),
    "train",
    "here:1",
    "b" * 64,
    hashlib.sha256(STATE).hexdigest(),
    len(STATE),
    9,
)  # type: ignore[arg-type]


@pytest.fixture
def takes(client: ExchangeClient, authority: Authority, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What the coordinator says to uploads, one after the other; then it gives a receipt. `takes.sent`: the counts."""

    class Takes:
        def __init__(self) -> None:
            self.errors, self.sent, self.known = list[FedtuneError](), list[int](), 40

        def upload(self, finished: Any) -> Any:
            self.sent.append(finished.envelope.sequence)
            if self.errors:
                raise said(self.errors.pop(0))
            return receipt.write(finished.envelope, 7, utc_now(), load(authority.place("coordinator")))

    made = Takes()
    monkeypatch.setattr(client, "_upload", made.upload)
    monkeypatch.setattr(client, "status", lambda: pb.StatusReply(sequence=made.known))
    return made


def refused(code: str) -> FedtuneError:
    return (Refused if code.startswith("W") else FedtuneError)(code, "x", "y", "z")


def test_a_receipt_is_held_and_nothing_is_sent_twice(client: ExchangeClient, takes: Any) -> None:
    assert client.held(TICKET) is None
    got = client.send(TICKET, b"an update")
    assert (got.row, got.client, takes.sent) == (7, "site-a", [1])
    assert client.held(TICKET) == got and takes.sent == [1] and client.flush() == []
    with pytest.raises(Refused, match=r"^W606"):
        client.send(TICKET, b"an update!")
    assert takes.sent == [1]


@pytest.mark.parametrize(("code", "counts"), [("W605", [1, 41]), ("T707", [1, 41]), ("W601", [1, 1])])
def test_an_update_is_signed_or_sent_again(
    client: ExchangeClient, takes: Any, code: str, counts: list[int]
) -> None:
    """The count was taken, the keys were renewed, or bytes were bent on the way."""
    takes.errors = [refused(code)]
    assert client.send(TICKET, b"an update").row == 7 and takes.sent == counts


@pytest.mark.parametrize("code", ["W605", "T707", "W601"])
def test_three_times_and_no_more(client: ExchangeClient, takes: Any, code: str) -> None:
    takes.errors = [refused(code)] * 9
    with pytest.raises(FedtuneError, match=f"^{code}"):
        client.send(TICKET, b"an update")
    assert len(takes.sent) == 3 and client.outbox.finished(TICKET)  # it stays spooled


@pytest.mark.parametrize("code", ["W602", "W604", "W606", "E805", "E806"])
def test_what_is_refused_for_good_is_dropped_with_its_reason(
    client: ExchangeClient, takes: Any, code: str
) -> None:
    takes.errors = [refused(code)]
    with pytest.raises(FedtuneError, match=f"^{code}"):
        client.send(TICKET, b"an update")
    assert client.outbox.finished(TICKET) is None and client.held(TICKET) is None and takes.sent == [1]
    assert [path.read_text()[:4] for path in client.outbox.folder.glob("*.refused")] == [code]


def test_what_was_damaged_here_is_computed_again_and_what_is_for_another_state_too(
    client: ExchangeClient, takes: Any
) -> None:
    client.outbox.keep(TICKET, b"an update").path.write_bytes(b"an updatE")
    takes.errors = [refused("W601")]
    assert client.held(TICKET) is None and client.outbox.finished(TICKET) is None
    client.outbox.keep(TICKET, b"an update")
    takes.errors = [refused("T706")]
    with pytest.raises(FedtuneError, match=r"^T706"):
        client.held(TICKET)
    for other in (replace(TICKET, base="c" * 64), replace(TICKET, given=Sha256("c" * 64))):
        assert client.held(other) is None
    assert client.held(TICKET) and takes.sent == [1, 2, 2]


def test_flush_goes_on_after_what_is_dropped_and_stops_where_nothing_can_be_sent(
    client: ExchangeClient, takes: Any
) -> None:
    for number in (4, 5, 6):
        client.outbox.keep(replace(TICKET, round=number), b"x")
    takes.errors = [refused("E806"), refused("T706")]
    with pytest.raises(FedtuneError, match=r"^T706"):
        client.flush()
    assert [one.envelope.round for one in client.outbox.waiting()] == [5, 6]
    assert [got.round for got in client.flush()] == [5, 6] and not list(client.outbox.waiting())


# --- states ---


def test_a_state_is_as_long_as_its_ticket_says(
    client: ExchangeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[pb.FetchRequest] = []
    given: list[list[bytes]] = []

    def fetch(request: pb.FetchRequest) -> Iterator[pb.Piece]:
        asked.append(request)
        return iter([pb.Piece(data=data) for data in given.pop(0)])

    monkeypatch.setattr(client, "_fetch", fetch)
    given[:] = [[STATE + b"x"], [STATE[:3]], [b"", STATE[3:]]]
    with pytest.raises(Refused, match=r"^W606"):
        client.fetch(TICKET)
    client.cache.part(TICKET.given).unlink()
    with pytest.raises(FedtuneError, match=r"^E808"):
        client.fetch(TICKET)
    assert client.fetch(TICKET) == STATE == client.fetch(TICKET)
    assert [(one.run, one.sha256.hex(), one.offset) for one in asked] == [
        ("run-1", TICKET.given, at) for at in (0, 0, 3)
    ]


def test_a_state_that_is_not_its_hash_is_fetched_twice_and_no_more(
    client: ExchangeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def fetch(request: pb.FetchRequest) -> Iterator[pb.Piece]:
        asked.append(request.offset)
        return iter([pb.Piece(data=b"another"[request.offset :])])

    monkeypatch.setattr(client, "_fetch", fetch)
    with pytest.raises(FedtuneError, match=r"^E807"):
        client.fetch(TICKET)
    assert asked == [0, 0] and not list(client.cache.folder.iterdir())

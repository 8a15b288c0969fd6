"""The exchange's book: who is asked, who was accepted, and what is still needed, in any order of events."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from fedtune.errors import FedtuneError
from fedtune.exchange.round_ledger import Accepted, Asked, Progress, RoundLedger
from fedtune.exchange.server_store import ServerStore
from fedtune.forms import Sha256
from fedtune.trust import Envelope, Name, Peer, Signed
from tests.refusals import code_of

BASE, GIVEN, OTHER = "b" * 64, "c" * 64, "d" * 64
NOW = datetime(2026, 1, 1, tzinfo=UTC)


def sha(text: str) -> Sha256:
    return Sha256(hashlib.sha256(text.encode()).hexdigest())


def said(
    client: str = "a", round: int = 1, run: str = "run-1", text: str = "", sequence: int = 1, **more: Any
) -> Envelope:
    """An update whose bytes are all its own, if not said otherwise."""
    text = text or f"{run} {round} {client}"
    return Envelope(
        "f",
        run,
        round,
        client,
        more.get("verb", "train"),
        BASE,
        GIVEN,
        sha(text),
        len(text),
        sequence,
        bytes(16),
    )


def accept(ledger: RoundLedger, envelope: Envelope, there: bool = True, key: str = "") -> Signed:
    peer = Peer(Name("f", envelope.client), key or f"{envelope.client} {envelope.round}", b"s", NOW, NOW)
    return ledger.accept(
        envelope, b"signature", peer, b"certificate", lambda row, now: Signed(b"row %d" % row, b"seal", b"sealer"), lambda: there
    )  # fmt: skip


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[RoundLedger]:
    made = RoundLedger(tmp_path / "book.db")
    yield made
    made.close()


def opened(
    ledger: RoundLedger, round: int = 1, run: str = "run-1", clients: str = "abc", verb: str = "train"
) -> None:
    ledger.open_round(run, round, verb, BASE, dict.fromkeys(clients, GIVEN), 99)


def test_what_a_client_may_answer_and_fetch(ledger: RoundLedger) -> None:
    opened(ledger, clients="ab")
    opened(ledger, 2, clients="b", verb="score")
    assert ledger.asked("run-1", 1, "train", "a") == Asked(BASE, GIVEN, 99, True)
    for about in (
        ("run-2", 1, "train", "a"),
        ("run-1", 2, "train", "a"),
        ("run-1", 1, "score", "a"),
        ("run-1", 1, "train", "c"),
    ):
        assert ledger.asked(*about) is None
    assert ledger.may_fetch("run-1", "a", GIVEN)
    for about in (("run-2", "a", GIVEN), ("run-1", "c", GIVEN), ("run-1", "a", OTHER)):
        assert not ledger.may_fetch(*about)
    ledger.close_round("run-1", 1, "train", {})
    assert ledger.asked("run-1", 1, "train", "a") == Asked(BASE, GIVEN, 99, False)
    assert ledger.asked("run-1", 2, "score", "b") == Asked(
        BASE, GIVEN, 99, True
    )  # only what was meant is closed
    ledger.open_round("run-1", 1, "train", OTHER, {"a": OTHER}, 7)  # asked anew, of others
    assert ledger.asked("run-1", 1, "train", "a") == Asked(OTHER, OTHER, 7, True)
    assert ledger.asked("run-1", 1, "train", "b") is None and ledger.asked("run-1", 2, "score", "b")


def test_an_update_counts_once_and_has_one_receipt(ledger: RoundLedger) -> None:
    opened(ledger)
    first = accept(ledger, said("b"))
    assert first == Signed(b"row 1", b"seal", b"sealer")
    assert accept(ledger, said("b", sequence=2)) == first == ledger.receipt("run-1", 1, "train", "b")[1]  # type: ignore[index]
    assert code_of(accept, ledger, said("b", text="another", sequence=3)) == "E805"
    assert accept(ledger, said("a")).record == b"row 2"
    assert ledger.receipt("run-1", 1, "train", "b") == (said("b").payload, first)
    assert ledger.receipt("run-1", 1, "train", "c") is None
    rows = ledger.accepted("run-1", 1, "train")
    assert rows == [
        Accepted(2, "a", said("a").payload, said("a").size),
        Accepted(1, "b", said("b").payload, said("b").size),
    ]
    assert isinstance(rows[0].payload, Sha256)
    stored = ledger.query(
        "SELECT envelope, signature, signer, sealer, released FROM accepted WHERE client = 'b'"
    )
    proofs = [hashlib.sha256(pem).hexdigest() for pem in (b"certificate", b"sealer")]
    assert stored == [(said("b").encode(), b"signature", *proofs, 0)]
    assert dict(ledger.query("SELECT sha256, pem FROM certificates")) == dict(
        zip(proofs, (b"certificate", b"sealer"), strict=True)
    )


def test_what_does_not_count_leaves_no_trace(ledger: RoundLedger) -> None:
    opened(ledger)
    opened(ledger, 2)
    accept(ledger, said("a", sequence=5), key="k")
    before = list(ledger.db.iterdump())
    assert code_of(accept, ledger, said("x")) == "W604"  # nobody asked
    assert code_of(accept, ledger, said("a", 2), there=False, key="k") == "E803"
    assert code_of(accept, ledger, said("a", 2, sequence=5), key="k") == "W605"
    assert list(ledger.db.iterdump()) == before
    ledger.close_round("run-1", 2, "train", {})
    assert code_of(accept, ledger, said("b", 2)) == "W604"
    assert not ledger.accepted("run-1", 2, "train")


def test_counts_are_of_a_key_and_used_once(ledger: RoundLedger) -> None:
    opened(ledger)
    assert ledger.newest("k") == 0
    ledger.check_sequence("k", 5)
    accept(ledger, said("a", sequence=5), key="k")
    assert (ledger.newest("k"), ledger.newest("other")) == (5, 0)
    assert code_of(ledger.check_sequence, "k", 5) == "W605"
    ledger.check_sequence("k", 6)
    ledger.check_sequence("other", 5)


def test_who_did_not_answer_is_left_out_with_the_reason_until_it_is_let_in(ledger: RoundLedger) -> None:
    opened(ledger, clients="abcd")
    opened(ledger, clients="ab", run="run-2")
    accept(ledger, said("a"))
    ledger.close_round("run-1", 1, "train", {"b": "too late", "a": "no"}, again=("d",))
    assert ledger.left_out("run-1", 1, "train") == {"b": "too late", "c": ""}
    ledger.close_round("run-1", 1, "train", {"b": "another reason", "c": "more"})
    assert ledger.left_out("run-1", 1, "train") == {
        "b": "too late",
        "c": "",
        "d": "",
    }  # for good: the first counts
    ledger.close_round("run-2", 1, "train", {})
    for about in (("run-1", 2, "train"), ("run-1", 1, "score")):
        assert ledger.left_out(*about) == {}
    ledger.let_in("run-1")
    assert ledger.left_out("run-1", 1, "train") == {} and set(ledger.left_out("run-2", 1, "train")) == {
        "a",
        "b",
    }
    assert [row.client for row in ledger.accepted("run-1", 1, "train")] == ["a"]


def test_a_round_that_is_asked_anew_takes_nothing_that_was_said_before(ledger: RoundLedger) -> None:
    for number, run in ((1, "run-1"), (2, "run-1"), (1, "run-2")):
        opened(ledger, number, run)
        accept(ledger, said("a", number, run), key=f"{number}{run}")
    ledger.release("run-1", 1, lambda sha256: None)
    ledger.let_in("run-1", anew=True)
    assert not ledger.accepted("run-1", 2, "train") and ledger.receipt("run-1", 2, "train", "a") is None
    assert ledger.receipt("run-1", 1, "train", "a") and ledger.accepted("run-2", 1, "train")


def test_an_acceptance_whose_bytes_were_lost_is_taken_back_and_its_number_is_not_used_again(
    ledger: RoundLedger,
) -> None:
    opened(ledger)
    opened(ledger, 2)
    for client in "ab":
        accept(ledger, said(client))
    accept(ledger, said("b", 2))
    ledger.forget("run-1", 1, "train", "b")
    assert [row.client for row in ledger.accepted("run-1", 1, "train")] == ["a"]
    assert ledger.accepted("run-1", 2, "train")[0].row == 3
    ledger.forget("run-1", 2, "train", "b")
    assert accept(ledger, said("b", sequence=2)).record == b"row 4"
    ledger.release("run-1", 1, lambda sha256: None)
    ledger.forget("run-1", 1, "train", "a")
    assert ledger.receipt("run-1", 1, "train", "a")  # what was released is never taken back


def test_release_removes_what_nobody_needs_any_more(ledger: RoundLedger) -> None:
    """Of two runs with the same state, and of updates with the same bytes."""
    removed: list[Sha256] = []
    for run in ("run-1", "run-2"):
        ledger.pin(run, GIVEN)
        ledger.pin(run, GIVEN)
        opened(ledger, 1, run)
    ledger.pin("run-1", OTHER)
    ledger.open_round("run-1", 2, "train", BASE, {"a": OTHER, "b": GIVEN}, 9)
    accept(ledger, said("a", text="same"))
    accept(ledger, said("b", text="mine"))
    accept(ledger, said("a", run="run-2", text="same"), key="x")
    ledger.close_round("run-1", 1, "train", {})
    ledger.release("run-1", 1, removed.append)
    assert removed == [sha("mine")] and isinstance(removed[0], Sha256)
    assert ledger.wanted(sha("same")) and ledger.wanted(GIVEN) and not ledger.wanted(sha("mine"))
    assert not ledger.accepted("run-1", 1, "train") and ledger.receipt("run-1", 1, "train", "b")
    assert ledger.asked("run-1", 1, "train", "a") is None and ledger.left_out("run-1", 1, "train") == {}
    assert ledger.asked("run-1", 2, "train", "a") and ledger.asked("run-2", 1, "train", "a")
    assert [(p.run, p.round) for p in ledger.progress()] == [("run-1", 2), ("run-2", 1)]
    removed.clear()
    ledger.release("run-2", 1, removed.append)
    assert removed == [sha("same")] and ledger.wanted(GIVEN)
    removed.clear()
    ledger.release("run-1", 2, removed.append)
    assert set(removed) == {GIVEN, OTHER} and not ledger.wanted(GIVEN) and not ledger.wanted(OTHER)


def test_a_member_of_a_run_is_who_is_asked_or_was_accepted(ledger: RoundLedger) -> None:
    opened(ledger, clients="ab")
    accept(ledger, said("a"))
    assert ledger.is_member("run-1", "a") and ledger.is_member("run-1", "b")
    assert not ledger.is_member("run-1", "c") and not ledger.is_member("run-2", "a")
    ledger.release("run-1", 1, lambda sha256: None)
    assert ledger.is_member("run-1", "a") and not ledger.is_member("run-1", "b")


def test_progress_says_the_newest_rounds_of_all_runs_of_one_and_of_a_members(ledger: RoundLedger) -> None:
    assert ledger.progress() == []
    opened(ledger, clients="ab")
    opened(ledger, 2, clients="abc", verb="score")
    opened(ledger, 1, "run-2", "c")
    for client in "ab":
        accept(ledger, said(client))
    ledger.close_round("run-1", 1, "train", {})
    first = Progress("run-1", 1, "train", False, 2, 2, said("a").size + said("b").size)
    second = Progress("run-1", 2, "score", True, 3, 0, 0)
    third = Progress("run-2", 1, "train", True, 1, 0, 0)
    assert ledger.progress() == [third, second, first]
    assert ledger.progress(limit=2) == [third, second]
    assert ledger.progress("run-1") == [second, first] and ledger.progress("run-3") == []
    assert ledger.progress(client="c") == [third, second, first] and ledger.progress(client="a") == [
        second,
        first,
    ]
    assert ledger.progress("run-2", "a") == [] and ledger.progress("run-2", "c") == [third]
    for number in range(10, 80):
        opened(ledger, number)
    assert len(ledger.progress()) == 64


def test_a_transaction_is_all_or_nothing_and_books_outlive_processes(ledger: RoundLedger) -> None:
    opened(ledger)
    accept(ledger, said("a"))
    before = list(ledger.db.iterdump())
    with pytest.raises(KeyboardInterrupt), ledger.transaction():
        ledger.db.execute("DELETE FROM accepted")
        raise KeyboardInterrupt
    assert list(ledger.db.iterdump()) == before
    again = RoundLedger(ledger.path)
    assert again.progress() == ledger.progress() and code_of(accept, again, said("b"), key="a 1") == "W605"
    assert again.query("PRAGMA synchronous") == [(2,)] and again.query("PRAGMA journal_mode") == [("wal",)]
    again.close()


def test_what_the_database_says_becomes_a_sentence(ledger: RoundLedger, tmp_path: Path) -> None:
    assert code_of(ledger.query, "SELECT * FROM nothing") == "E804"
    assert code_of(RoundLedger, tmp_path / "none" / "book.db") == "E804"
    (tmp_path / "damaged.db").write_bytes(b"none" * 4096)
    with pytest.raises(FedtuneError, match=r"E807.*'damaged\.db'"):
        RoundLedger(tmp_path / "damaged.db")


# --- with its files ---


@pytest.fixture
def server_store(tmp_path: Path) -> Iterator[ServerStore]:
    made = ServerStore(tmp_path / "exchange")
    yield made
    made.close()


def test_the_book_is_beside_its_objects(server_store: ServerStore, tmp_path: Path) -> None:
    """Other programs open it by this name: the split service, and fedtune status."""
    assert (tmp_path / "exchange" / "book.db").exists() and server_store.store.folder == tmp_path / "exchange"


def test_a_crash_leaves_nothing_that_stays(server_store: ServerStore) -> None:
    offered, objects = server_store.offer("run-1", b"state"), server_store.store.objects
    orphan = server_store.store.put(b"an update that never counted")
    (objects / f".{orphan}.1-2.part").write_bytes(b"half")
    (objects / f".{offered}.1-2.part").write_bytes(b"half, maybe being written just now")
    server_store.sweep()
    assert sorted(path.name for path in objects.iterdir()) == sorted([f".{offered}.1-2.part", offered])


def test_only_what_was_offered_can_be_given(server_store: ServerStore) -> None:
    state = server_store.offer("run-1", b"state")
    assert server_store.offer("run-1", b"state") == state == sha("state") and server_store.ledger.wanted(
        state
    )
    assert code_of(server_store.open_round, "run-1", 1, "train", BASE, {"a": state, "b": OTHER}, 9) == "E803"
    assert not server_store.progress()
    server_store.open_round("run-1", 1, "train", BASE, {"a": state}, 9)
    assert (
        server_store.progress("run-1")
        == [Progress("run-1", 1, "train", True, 1, 0, 0)]
        == server_store.progress()
    )


def test_an_accepted_update_is_read_or_no_longer_counts(server_store: ServerStore) -> None:
    state = server_store.offer("run-1", b"state")
    server_store.open_round("run-1", 1, "train", BASE, dict.fromkeys("ab", state), 9)
    assert code_of(server_store.read, "run-1", 1, "train", "a") == "E803"
    for client in "ab":
        accept(server_store.ledger, replace(said(client), given=state))
        server_store.store.put(f"run-1 1 {client}".encode())
    assert server_store.read("run-1", 1, "train", "b") == b"run-1 1 b"
    path = server_store.store.path(said("b").payload)
    path.write_bytes(b"damaged")
    assert code_of(server_store.read, "run-1", 1, "train", "b") == "E807"
    assert [row.client for row in server_store.accepted("run-1", 1, "train")] == ["a"]
    server_store.store.remove(said("a").payload)
    assert code_of(server_store.read, "run-1", 1, "train", "a") == "E803"
    assert not server_store.accepted("run-1", 1, "train")


def test_uploads_under_way_go_with_their_round(server_store: ServerStore) -> None:
    parts = [
        server_store.store.part(run, number, "a", sha(run))
        for run, number in (("run-1", 1), ("run-1", 2), ("run-1", 3), ("run-2", 1))
    ]  # type: ignore[arg-type]
    for part in parts:
        part.path.write_bytes(b"half")
    server_store.close_round("run-1", 1, "train")
    server_store.release("run-1", 2)
    assert [part.path.exists() for part in parts] == [False, False, True, True]
    server_store.let_in("run-1", True)
    assert server_store.left_out("run-1", 1, "train") == {}

"""Files of the exchange at both ends: objects by their hash, parts, a client's cache and what it has to send."""

from __future__ import annotations

import hashlib
import os
import stat
from dataclasses import replace
from pathlib import Path

import pytest

from fedtune.errors import FedtuneError
from fedtune.exchange.cache import Cache
from fedtune.exchange.limits import CHUNK
from fedtune.exchange.objects import Store, digest_of
from fedtune.exchange.outbox import Finished, Outbox, name_of
from fedtune.forms import MemberName, Sha256
from fedtune.trust import Identity, Signed, Ticket, envelope, load
from fedtune.trust.authority import create
from tests.refusals import code_of

DATA = b"abc" * CHUNK


def sha(data: bytes) -> Sha256:
    return Sha256(hashlib.sha256(data).hexdigest())


# --- the coordinator's objects ---


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def test_an_object_is_there_whole_or_not_at_all(store: Store) -> None:
    name = store.put(DATA)
    assert name == sha(DATA) == digest_of(store.path(name)) and store.has(name)
    assert store.read(name) == DATA and store.size(name) == len(DATA)
    assert [len(piece) for piece in store.stream(name)] == [CHUNK] * 3
    assert (
        b"".join(store.stream(name, CHUNK + 1)) == DATA[CHUNK + 1 :]
        and list(store.stream(name, len(DATA))) == []
    )
    assert store.read(store.put(b"")) == b""
    written = store.path(name).stat().st_ino
    assert store.put(DATA, name) == name and store.path(name).stat().st_ino == written  # not a second time
    store.path(name).write_bytes(b"damaged")
    assert store.put(DATA, name) == name and store.read(name) == DATA
    store.remove(name)
    store.remove(name)
    assert not store.has(name)
    for call in (store.read, store.size, lambda name: list(store.stream(name))):
        assert code_of(call, name) == "E803"
    for place in ("", "objects", "incoming", "damaged"):
        assert stat.S_IMODE((store.folder / place).stat().st_mode) == 0o700
    assert (
        0
        < store.free()
        == pytest.approx(os.statvfs(store.folder).f_bavail * os.statvfs(store.folder).f_frsize, 0.2)
    )


def test_a_damaged_object_is_put_aside_before_its_last_piece_is_given(store: Store) -> None:
    name = store.put(DATA)
    store.path(name).write_bytes(DATA[:-1] + b"x")
    got: list[bytes] = []
    with pytest.raises(FedtuneError, match="E807"):
        for piece in store.stream(name):
            got.append(piece)  # an error does not undo what came before
    assert b"".join(got) == DATA[: 2 * CHUNK] and not store.has(name)
    assert digest_of(store.damaged / name) == sha(DATA[:-1] + b"x")
    store.path(name).write_bytes(b"x")
    assert list(store.stream(name, 1)) == [] and store.has(name)  # from the middle nobody can tell
    assert code_of(store.read, name) == "E807" and (store.damaged / name).read_bytes() == b"x"  # the newest


def test_an_upload_is_found_by_its_run_and_says_whose_it_is(store: Store) -> None:
    part = store.part("run-1", 7, MemberName("site-a.b_c"), Sha256("e" * 64))
    others = [
        store.part("run-1", 123456789, MemberName("site-a"), sha(b"")),
        store.part("run-2", 7, MemberName("site-a"), sha(b"")),
    ]
    assert (part.round, part.client, part.envelope) == (7, "site-a.b_c", "e" * 32)
    assert part.path.parent == store.incoming and len({one.path for one in (part, *others)}) == 3
    for one in (part, *others):
        one.path.write_bytes(DATA)
    beginning = part.path.name.partition("-")[0]
    for junk in ("x.part", f"{beginning}-x-site-a-{'e' * 32}.part", f"{beginning}-7-site-a-{'e' * 31}.part"):
        (store.incoming / junk).write_bytes(b"")
    assert {one.path: one for one in store.parts("run-1")} == {one.path: one for one in (part, others[0])}
    assert list(store.parts("run-2")) == [others[1]] and not list(store.parts("run-3"))
    store.adopt(part.path, sha(DATA))
    assert store.read(sha(DATA)) == DATA and not part.path.exists()
    assert code_of(store.adopt, part.path, sha(DATA)) == "R404"


# --- a client's cache ---


def kept(cache: Cache, data: bytes, used: int = 0) -> Path:
    cache.part(sha(data)).write_bytes(data)
    assert cache.keep(sha(data))
    path = cache.folder / sha(data)
    os.utime(path, ns=(used, used))
    return path


def test_the_cache_gives_what_it_has_whole_and_nothing_else(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache", 100)
    assert stat.S_IMODE(cache.folder.stat().st_mode) == 0o700 and cache.get(sha(b"one")) is None
    path = kept(cache, b"one")
    assert cache.get(sha(b"one")) == b"one" and path.stat().st_mtime_ns > 0  # it was used just now
    path.write_bytes(b"two")
    assert cache.get(sha(b"one")) is None and not path.exists()
    cache.part(sha(b"one")).write_bytes(b"two")
    assert not cache.keep(sha(b"one")) and not list(cache.folder.iterdir())
    assert code_of(cache.keep, sha(b"one")) == "R404"


def test_the_least_recently_used_go_when_the_cache_is_full(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache", 100)
    other = cache.folder / "notes.txt"
    other.write_bytes(bytes(1000))
    held = [kept(cache, bytes([number]) * 25, used) for number, used in enumerate((30, 10, 20))]
    (cache.folder / f"{'e' * 64}.part").write_bytes(b"left by a fetch that nobody goes on with")
    held.append(kept(cache, b"d" * 25, 40))
    assert all(path.exists() for path in held) and not list(cache.folder.glob("*.part"))  # 100 of 100 bytes
    held.append(kept(cache, b"e" * 26, 50))
    assert [path.exists() for path in held] == [True, False, False, True, True]  # two of 25 make room for 26
    held.append(kept(cache, b"f" * 200, 60))
    assert [path.exists() for path in held] == [False] * 5 + [True] and other.exists()


# --- what a client has to send ---


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Identity:
    return load(
        create(tmp_path_factory.mktemp("k") / "keys", "hospitals", ["localhost"], 30).issue("site-a", 30)
    )


@pytest.fixture
def outbox(tmp_path: Path, site: Identity) -> Outbox:
    return Outbox(tmp_path / "spool", site)


TICKET = Ticket("run-1", 3, MemberName("site-a"), "train", "here:1", "b" * 64, "c" * 64, 10, 99)


def test_an_answer_has_the_name_of_its_question() -> None:
    asked = {"run": "run-2", "round": 4, "verb": "score", "attempt": 2}
    names = {name_of(TICKET), *(name_of(replace(TICKET, **{key: value})) for key, value in asked.items())}
    assert len(names) == 5 and {len(name) for name in names} == {32}
    assert name_of(replace(TICKET, address="there:2", budget=1, details="x")) == name_of(TICKET)


def test_what_is_finished_is_signed_and_on_disk(outbox: Outbox, site: Identity) -> None:
    assert outbox.finished(TICKET) is None and not list(outbox.waiting())
    made = outbox.keep(TICKET, b"an update")
    said = made.envelope
    assert (said.federation, said.run, said.round, said.client, said.verb, said.base, said.given) == (
        "hospitals",
        *(getattr(TICKET, name) for name in ("run", "round", "client", "verb", "base", "given")),
    )
    assert (said.payload, said.size, said.sequence, said.protocol) == (
        sha(b"an update"),
        9,
        1,
        TICKET.protocol,
    )
    assert envelope.verified(said.encode(), made.signature, site.peer) == said
    assert (made.name, made.address, made.path.read_bytes()) == (name_of(TICKET), "here:1", b"an update")
    again = Outbox(outbox.folder, site)  # after a restart
    assert again.finished(TICKET) == made and list(again.waiting()) == [made]
    assert {stat.S_IMODE(path.stat().st_mode) for path in outbox.folder.iterdir()} == {0o600}
    assert not again.damaged(made) and again.finished(TICKET) == made
    anew = again.keep(TICKET, b"another")
    assert again.finished(TICKET) == anew != made and anew.envelope.nonce != said.nonce


def test_counts_go_up_whatever_happens_to_the_process_or_the_file(outbox: Outbox, site: Identity) -> None:
    assert [outbox.count(), outbox.count(), outbox.count(7), outbox.count(3)] == [1, 2, 8, 9]
    assert Outbox(outbox.folder, site).count() == 10
    (outbox.folder / "sequence").write_text("none")
    assert outbox.count(20) == 21 and (outbox.folder / "sequence").read_text() == "21"


def test_what_waits_is_sent_in_the_order_of_its_counts(outbox: Outbox) -> None:
    made = [outbox.keep(replace(TICKET, round=number), b"x" * number) for number in (5, 2, 9)]
    assert list(outbox.waiting()) == made
    again = outbox.sign_again(made[0], 50)
    assert again.envelope == replace(made[0].envelope, sequence=51, nonce=again.envelope.nonce)
    assert again.envelope.nonce != made[0].envelope.nonce and again.signature != made[0].signature
    assert (again.name, again.path, again.address) == (made[0].name, made[0].path, made[0].address)
    assert list(outbox.waiting()) == [made[1], made[2], again]


def left(outbox: Outbox) -> set[str]:
    return {path.suffix for path in outbox.folder.iterdir()} - {""}


def test_an_update_goes_when_its_receipt_is_held_or_it_will_never_be_taken(outbox: Outbox) -> None:
    signed = Signed(b"record", b"signature", b"certificate")
    assert outbox.receipt(TICKET) is None
    outbox.settle(outbox.keep(TICKET, b"x"), signed)
    assert outbox.receipt(TICKET) == signed and left(outbox) == {".receipt"} and not list(outbox.waiting())
    other = replace(TICKET, round=4)
    outbox.give_up(made := outbox.keep(other, b"x"), FedtuneError("W604", "this", "that", "do so"))
    assert left(outbox) == {".receipt", ".refused"} and outbox.receipt(other) is None
    reason = outbox.folder / f"{made.name}.refused"
    assert reason.read_text() == f"{FedtuneError('W604', 'this', 'that', 'do so')}\n"


@pytest.mark.parametrize("damage", ["other bytes", "no update", "cut", "no envelope", "junk", "another's"])
def test_what_is_damaged_is_computed_again(outbox: Outbox, damage: str) -> None:
    made = outbox.keep(TICKET, b"an update")
    about = made.path.with_suffix(".envelope")
    if damage == "other bytes":
        made.path.write_bytes(b"an updatE")
        assert outbox.finished(TICKET) == made  # its hash is looked at when the coordinator complains
    elif damage == "no update":
        made.path.unlink()
    elif damage == "cut":
        made.path.write_bytes(b"an up")
    elif damage == "no envelope":
        about.unlink()
    else:
        about.write_bytes(
            b"none" if damage == "junk" else b'{"envelope": "eA==", "signature": "", "address": ""}'
        )
    assert damage == "other bytes" or outbox.finished(TICKET) is None
    if damage in ("other bytes", "no update", "cut"):
        assert outbox.damaged(made) and not left(outbox)
    assert not any(isinstance(one, Finished) for one in outbox.waiting())

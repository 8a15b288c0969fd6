"""An upload from its offer to its receipt, without a network: what it needs, what it may do, and what is left of it."""

from __future__ import annotations

import errno
import hashlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import pytest

from fedtune.errors import Refused
from fedtune.exchange import uploads as uploads_module
from fedtune.exchange.events import UpdateAccepted
from fedtune.exchange.grpc_errors import NoRoom
from fedtune.exchange.limits import CHUNK, ENVELOPE, Limits
from fedtune.exchange.uploads import IDLE, Upload, Uploads
from fedtune.trust import AllowList, Envelope, Signed, receipt
from fedtune.trust.authority import revoke
from tests.exchange.federation import Federation, said
from tests.exchange.pushing import SMALL, UPDATE
from tests.refusals import code_of


class Stream:
    """A call as an upload sees it."""

    def __init__(self, ends: Any = lambda: None) -> None:
        self.cancelled, self.ends = 0, ends

    def is_active(self) -> bool:
        return True

    def cancel(self) -> None:
        self.cancelled += 1
        self.ends()


class Scene:
    def __init__(self, root: Path, **limits: Any) -> None:
        self.federation = Federation(root)
        self.server_store, self.told = self.federation.server_store, list[Any]()
        self.uploads = self.made(**limits)
        self.incoming = self.server_store.store.incoming

    def made(self, **limits: Any) -> Uploads:
        allowed = AllowList(self.federation.authority.allowed)
        return Uploads(
            self.server_store,
            self.federation.coordinator,
            allowed,
            Limits(**{"free_bytes": 0, **limits}),
            self.told.append,
        )

    def offer(
        self, envelope: Envelope, stream: Stream | None = None, data: bytes | None = None
    ) -> AbstractContextManager[Upload | Signed]:
        site = self.federation.sites[envelope.client]
        data = envelope.encode() if data is None else data
        return self.uploads.receive(site.peer, site.certificate, data, site.sign(data), stream or Stream())

    def sent(self, envelope: Envelope, data: bytes) -> Signed:
        with self.offer(envelope) as upload:
            return upload if isinstance(upload, Signed) else self.uploads.take(upload, in_pieces(data))

    def left(self) -> list[bytes]:
        return [path.read_bytes() for path in self.incoming.iterdir()]


def in_pieces(data: bytes) -> Iterator[bytes]:
    return (data[at : at + CHUNK] for at in range(0, len(data), CHUNK))


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    made = Scene(tmp_path)
    yield made
    made.federation.close()


def test_an_update_counts_and_is_told_of(scene: Scene) -> None:
    envelope = said(scene.federation, UPDATE)
    with scene.offer(envelope) as upload:
        assert isinstance(upload, Upload)
        assert (upload.envelope, upload.written, upload.resumed) == (envelope, 0, 0)
        assert upload.reserved == upload.promised == len(UPDATE)
        assert list(scene.uploads.active.values()) == [upload]
        signed = scene.uploads.take(upload, in_pieces(UPDATE))
        assert upload.written == len(UPDATE) and upload.promised == 0
    assert not scene.uploads.active and upload.ended.is_set() and not scene.left()
    proof = receipt.read(signed, scene.federation.coordinator.authority, envelope)
    (event,) = scene.told
    assert isinstance(event, UpdateAccepted) and 0 <= event.seconds < 600
    row, seconds = proof.row, event.seconds
    assert {**vars(event), "at": 0} == {
        **vars(UpdateAccepted("run-1", 1, "train", "site-a", row, len(UPDATE), seconds, 0)),
        "at": 0,
    }
    stored = scene.server_store.ledger.query(
        "SELECT signature, pem FROM accepted JOIN certificates ON signer = sha256"
    )
    site = scene.federation.sites["site-a"]
    assert stored == [(site.sign(envelope.encode()), site.certificate)]
    with scene.offer(envelope) as again:  # the receipt as it was given, without a byte
        assert again == signed


def test_an_offer_is_judged_before_it_takes_anything(scene: Scene) -> None:
    federation = scene.federation
    scene.sent(said(federation, SMALL, sequence=7), SMALL)
    federation.open(2)
    federation.open(3)
    scene.server_store.close_round("run-1", 3, "train")
    budget = federation.budget
    for envelope, code in (
        (said(federation, SMALL, round=2, sequence=7), "W605"),
        (said(federation, b"other", sequence=8), "E805"),
        (said(federation, SMALL, round=3, sequence=8), "W604"),
        (said(federation, SMALL, round=4, sequence=8), "W604"),
        (said(federation, SMALL, run="run-9", sequence=8), "E806"),
        (said(federation, SMALL, "site-c"), "E806"),
        (said(federation, SMALL, round=2, sequence=8, base="c" * 64), "W604"),
        (said(federation, SMALL, round=2, sequence=8, given="c" * 64), "W604"),
        (said(federation, SMALL, round=2, sequence=8, size=budget + 1), "W606"),
    ):
        assert code_of(lambda e=envelope: scene.offer(e).__enter__()) == code
    assert (
        code_of(lambda: scene.offer(said(federation, SMALL), data=bytes(ENVELOPE + 1)).__enter__()) == "W606"
    )
    assert code_of(lambda: scene.offer(said(federation, SMALL), data=bytes(ENVELOPE)).__enter__()) == "W601"
    assert not scene.uploads.active and not scene.left()
    with scene.offer(said(federation, SMALL, round=2, sequence=8, size=budget)) as upload:
        assert isinstance(upload, Upload) and upload.reserved == budget


def test_an_upload_goes_on_where_it_stopped(scene: Scene) -> None:
    """What came is kept; parts of other updates of the same client go, and of others none."""
    federation, at = scene.federation, CHUNK + 5
    envelope, store = said(federation, UPDATE), scene.server_store.store
    part = store.part("run-1", 1, envelope.client, envelope.digest).path
    old = store.part("run-1", 1, envelope.client, said(federation, b"old").digest).path
    others = store.part(
        "run-1", 1, said(federation, b"", "site-b").client, said(federation, b"old").digest
    ).path
    for path in (old, others):
        path.write_bytes(b"half")
    part.write_bytes(UPDATE[:at])
    with scene.offer(envelope) as upload:
        assert isinstance(upload, Upload) and (upload.written, upload.resumed) == (at, at)
        assert upload.promised == len(UPDATE) - at and not old.exists() and others.exists()
        scene.uploads.take(upload, in_pieces(UPDATE[at:]))
    assert scene.told[0].resumed == at and scene.server_store.read("run-1", 1, "train", "site-a") == UPDATE


def test_a_part_that_is_longer_than_its_update_is_begun_anew(scene: Scene) -> None:
    envelope = said(scene.federation, SMALL)
    part = scene.server_store.store.part("run-1", 1, envelope.client, envelope.digest).path
    part.write_bytes(SMALL + b"x")
    with scene.offer(envelope) as upload:
        assert isinstance(upload, Upload) and upload.written == 0 and not part.exists()
    part.write_bytes(SMALL)
    with scene.offer(envelope) as upload:  # all is there, and was not counted before a crash
        assert isinstance(upload, Upload) and upload.written == len(SMALL)
        assert scene.uploads.take(upload, iter([]))


def test_streams_that_are_not_as_they_said(scene: Scene) -> None:
    envelope = said(scene.federation, UPDATE)
    for data, code, left in (
        (UPDATE[:-1], "E808", [UPDATE[:-1]]),
        (b"x", "W601", []),
        (UPDATE + b"x", "W606", []),
        (UPDATE[:CHUNK], "E808", [UPDATE[:CHUNK]]),
        (UPDATE[CHUNK:-1] + b"!", "W601", []),
    ):
        assert code_of(scene.sent, envelope, data) == code and scene.left() == left
    assert not scene.told and not scene.uploads.active and scene.sent(envelope, UPDATE)


def test_room_is_promised_once(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """Free bytes, less those that stay free, less what others were promised and have not written yet."""
    scene.uploads = scene.made(free_bytes=100)
    free = [100 + 2 * len(UPDATE) - 1]
    monkeypatch.setattr(scene.server_store.store, "free", lambda: free[0])
    a, b = said(scene.federation, UPDATE), said(scene.federation, UPDATE, "site-b")
    with scene.offer(a) as upload:
        assert isinstance(upload, Upload)
        with pytest.raises(NoRoom, match=f"room for {len(UPDATE) - 1} bytes") as full, scene.offer(b):
            pass
        assert full.value.retry_after == 30.0
        upload.written = 1
        with scene.offer(b) as other:
            assert isinstance(other, Upload) and other.reserved == len(UPDATE)
    part = scene.server_store.store.part("run-1", 1, a.client, a.digest).path
    part.write_bytes(UPDATE[:10])
    for free[0], fits in ((100 + len(UPDATE) - 10, True), (100 + len(UPDATE) - 11, False), (0, False)):
        if fits:
            with scene.offer(a) as upload:
                assert upload
        else:
            assert code_of(lambda: scene.offer(a).__enter__()) == "E804"


@pytest.mark.parametrize(
    ("number", "code"),
    [(errno.ENOSPC, "E804"), (errno.EDQUOT, "E804"), (errno.EFBIG, "E804"), (errno.EIO, "")],
)
def test_a_full_disk_keeps_what_came(
    scene: Scene, number: int, code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    envelope, written = said(scene.federation, UPDATE), uploads_module.write

    def fills(handle: int, data: bytes) -> None:
        if handle and len(data) < CHUNK:
            raise OSError(number, "no more")
        written(handle, data)

    monkeypatch.setattr(uploads_module, "write", fills)
    if code:
        with pytest.raises(
            NoRoom, match=f"no room for {len(UPDATE) - 3 * CHUNK} more bytes.*no more"
        ) as full:
            scene.sent(envelope, UPDATE)
        assert full.value.retry_after == 30.0
    else:
        with pytest.raises(OSError, match="no more"):
            scene.sent(envelope, UPDATE)
    assert scene.left() == [UPDATE[: 3 * CHUNK]] and not scene.uploads.active


def test_who_was_revoked_meanwhile_does_not_count(scene: Scene) -> None:
    with scene.offer(said(scene.federation, SMALL)) as upload:
        assert isinstance(upload, Upload)
        revoke(scene.federation.authority.place("coordinator"), "site-a")
        assert code_of(scene.uploads.take, upload, in_pieces(SMALL)) == "T706"
    assert not scene.server_store.accepted("run-1", 1, "train") and not scene.told


@pytest.mark.parametrize("needed", [False, True])
def test_what_is_refused_at_the_end_stays_an_upload(scene: Scene, needed: bool) -> None:
    """And an object of the same bytes, where another run needs it."""
    store, name = scene.server_store.store, hashlib.sha256(SMALL).hexdigest()
    if needed:
        scene.server_store.offer("run-2", SMALL)
    with scene.offer(said(scene.federation, SMALL)) as upload:
        assert isinstance(upload, Upload)
        scene.server_store.close_round("run-1", 1, "train")
        assert code_of(scene.uploads.take, upload, in_pieces(SMALL)) == "W604"
    assert (store.objects / name).exists() == needed and scene.left() == ([] if needed else [SMALL])
    assert not scene.told


def test_a_new_connection_takes_over_from_one_that_is_silent(scene: Scene) -> None:
    """The same update at once, another one after a while, and never while the old one does not end."""
    federation, first, stack = scene.federation, said(scene.federation, UPDATE), ExitStack()
    federation.open(2)
    another = said(federation, SMALL, round=2, sequence=2)
    stream = Stream(stack.close)
    upload = stack.enter_context(scene.offer(first, stream))
    assert isinstance(upload, Upload)
    with pytest.raises(NoRoom, match="second upload of 'site-a'") as busy, scene.offer(another):
        pass
    assert busy.value.retry_after == IDLE == 2.0 and stream.cancelled == 0
    with scene.offer(said(federation, SMALL, "site-b")):  # the others do not notice
        pass
    with scene.offer(first) as again:
        assert stream.cancelled == 1 and isinstance(again, Upload) and again is not upload
        again.moved -= IDLE + 1
        scene.uploads.active["site-a"].cancel = stack.close
        again.ended.set()
        assert (
            code_of(lambda: scene.offer(another).__enter__()) == "E804"
        )  # it has said so, and is still there
    with ExitStack() as held:
        late = held.enter_context(scene.offer(first, Stream(held.close)))
        assert isinstance(late, Upload)
        late.moved -= IDLE + 1
        with scene.offer(another) as new:
            assert isinstance(new, Upload) and new.envelope == another
    assert not scene.uploads.active


def test_an_upload_that_does_not_move_is_cut(scene: Scene) -> None:
    scene.uploads = scene.made(stall_seconds=50.0)
    streams = [Stream(), Stream()]
    with (
        scene.offer(said(scene.federation, SMALL), streams[0]) as slow,
        scene.offer(said(scene.federation, SMALL, "site-b"), streams[1]) as other,
    ):
        assert isinstance(slow, Upload) and isinstance(other, Upload)
        scene.uploads.cut_stalled()
        slow.moved -= 51
        scene.uploads.cut_stalled()
        assert [stream.cancelled for stream in streams] == [1, 0]
        slow.reserved = 0  # one that waits for a slot is not cut
        scene.uploads.cut_stalled()
        assert streams[0].cancelled == 1


def test_uploads_take_their_turns(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedtune.exchange.limiter.LOOK", 0.01)
    scene.uploads = scene.made(uploads=1, waiting=3, wait_seconds=0.01)
    other = said(scene.federation, SMALL, "site-b")
    with scene.offer(said(scene.federation, SMALL)):
        assert code_of(lambda: scene.offer(other).__enter__()) == "E804" and list(scene.uploads.active) == [
            "site-a"
        ]
    with scene.offer(other) as upload:
        assert isinstance(upload, Upload)


def test_refusals_are_of_their_kind(scene: Scene) -> None:
    """A client drops what is Refused; anything else it may send again."""
    with pytest.raises(Refused), scene.offer(said(scene.federation, SMALL, round=4)):
        pass

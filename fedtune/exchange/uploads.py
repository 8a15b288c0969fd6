"""An upload from its offer to its receipt: judged before it takes anything, written by pieces, counted once
it is on disk."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedtune.errors import FedtuneError, Refused
from fedtune.events import Event
from fedtune.exchange.events import UpdateAccepted
from fedtune.exchange.grpc_errors import NoRoom
from fedtune.exchange.limiter import Turns
from fedtune.exchange.limits import CHUNK, ENVELOPE, Limits
from fedtune.exchange.round_ledger import second
from fedtune.exchange.server_store import ServerStore
from fedtune.trust import AllowList, Envelope, Identity, Peer, Signed, envelope, receipt

IDLE = 2.0  # seconds without a piece after which a client's new connection replaces its old one


@dataclass
class Upload:
    """One update on its way. `path` holds what has arrived."""

    envelope: Envelope
    signature: bytes
    peer: Peer
    certificate: bytes
    cancel: Callable[[], object]
    path: Path
    written: int = 0
    reserved: int = 0
    resumed: int = 0
    began: float = field(default_factory=time.monotonic)
    moved: float = field(default_factory=time.monotonic)
    ended: threading.Event = field(default_factory=threading.Event)

    @property
    def promised(self) -> int:
        """Bytes of the disk that it still may take."""
        return max(self.reserved - self.written, 0)


class Uploads:
    """All uploads of one service. Memory: one piece an upload, whatever its size."""

    def __init__(
        self,
        server_store: ServerStore,
        coordinator: Identity,
        allowed: AllowList,
        limits: Limits,
        tell: Callable[[Event], None],
    ) -> None:
        self.server_store, self.coordinator, self.allowed, self.limits, self.tell = (
            server_store,
            coordinator,
            allowed,
            limits,
            tell,
        )
        self.active: dict[str, Upload] = {}
        self._lock = threading.Lock()
        self._turns = Turns(limits.uploads, limits.waiting, limits.wait_seconds, "uploads")

    @contextlib.contextmanager
    def receive(
        self, peer: Peer, certificate: bytes, data: bytes, signature: bytes, context: Any
    ) -> Iterator[Upload | Signed]:
        """The upload that an offer announces, or the receipt that it got before.

        Raises FedtuneError T705, T707, E805, E806, NoRoom, Refused W601 to W606; nothing is on disk then.
        """
        if len(data) > ENVELOPE:
            raise Refused(
                "W606", f"an envelope of {len(data)} bytes", f"at most {ENVELOPE}", "check the sender"
            )
        said = envelope.verified(data, signature, peer)
        if held := self._judge(said, peer):
            yield held
            return
        upload = Upload(
            said,
            signature,
            peer,
            certificate,
            context.cancel,
            self.server_store.store.part(said.run, said.round, said.client, said.digest).path,
        )
        with self._alone(upload), self._turns.turn(context.is_active):
            self._reserve(upload)
            self._resume(upload)
            yield upload

    def _judge(self, said: Envelope, peer: Peer) -> Signed | None:
        """The receipt where the same update was accepted before; None where this one may come."""
        ledger = self.server_store.ledger
        held = ledger.receipt(said.run, said.round, said.verb, said.client)
        if held:
            if held[0] == said.payload:
                return held[1]
            raise second(said)
        asked = ledger.asked(said.run, said.round, said.verb, said.client)
        if asked is None:
            if not ledger.is_member(said.run, said.client):
                raise FedtuneError(
                    "E806",
                    f"run {said.run[:80]!r}",
                    f"a run of which '{said.client}' is a member",
                    "answer the coordinator's tickets only",
                )
            raise Refused(
                "W604",
                f"'{said.verb[:40]}' of round {said.round}",
                "what was asked and is not over",
                "drop this update, and answer the next ticket",
            )
        if not asked.open:
            raise Refused(
                "W604",
                f"an update for round {said.round}, which is closed",
                "one for an open round",
                "drop it, and answer the next ticket",
            )
        said.require(base=asked.base, given=asked.given)
        if said.size > asked.budget:
            raise Refused(
                "W606",
                f"an update of {said.size} bytes",
                f"at most {asked.budget}",
                "use the recipe's message chain",
            )
        ledger.check_sequence(peer.key, said.sequence)
        return None

    @contextlib.contextmanager
    def _alone(self, upload: Upload) -> Iterator[None]:
        """One upload a client. A new connection for the same update, or after a silence, replaces the one
        before. Raises NoRoom."""
        client = upload.envelope.client
        if old := self.active.get(client):
            if old.envelope.digest != upload.envelope.digest and time.monotonic() - old.moved < IDLE:
                raise one_by_one(client)
            old.cancel()  # a connection that broke without our noticing
            if not old.ended.wait(5):
                raise one_by_one(client)
        with self._lock:
            if client in self.active:
                raise one_by_one(client)
            self.active[client] = upload
        try:
            yield
        finally:
            with self._lock:
                del self.active[client]
            upload.ended.set()

    def _reserve(self, upload: Upload) -> None:
        """Room on the disk, besides what others were promised. Raises NoRoom."""
        with self._lock:
            promised = sum(other.promised for other in self.active.values())
            there = upload.path.stat().st_size if upload.path.exists() else 0
            needed = max(upload.envelope.size - there, 0)
            if (free := self.server_store.store.free() - promised - self.limits.free_bytes) < needed:
                raise NoRoom(
                    f"room for {max(free, 0)} bytes of updates on the coordinator's disk", f"{needed}", 30.0
                )
            upload.written, upload.reserved, upload.moved = there, upload.envelope.size, time.monotonic()

    def _resume(self, upload: Upload) -> None:
        """How much of the update is here already. Parts of other updates of this client for this run are
        dropped."""
        said, store = upload.envelope, self.server_store.store
        for part in store.parts(said.run):
            if part.client == said.client and part.path != upload.path:
                part.path.unlink(missing_ok=True)
        if upload.path.exists() and upload.path.stat().st_size > said.size:
            upload.path.unlink()
        upload.written = upload.resumed = upload.path.stat().st_size if upload.path.exists() else 0

    def take(self, upload: Upload, pieces: Iterator[bytes]) -> Signed:
        """Write the pieces until all is here, and make the update count. What arrived before a break is kept.

        Raises NoRoom, Refused W601, W604, W605, W606, FedtuneError E805, E808, T706.
        """
        said, store = upload.envelope, self.server_store.store
        digest = hashlib.sha256()
        with self._disk(upload), upload.path.open("a+b", buffering=0) as file:
            file.seek(0)
            while piece := file.read(CHUNK):
                digest.update(piece)
            while upload.written < said.size:
                piece = next(pieces, b"")
                if not piece:
                    raise FedtuneError(
                        "E808",
                        f"a stream that ended after {upload.written} of {said.size} bytes",
                        "the rest",
                        "send it from there on",
                    )
                if upload.written + len(piece) > said.size:
                    upload.path.unlink()
                    raise Refused(
                        "W606",
                        f"more than the declared {said.size} bytes",
                        "as many as declared",
                        "declare the right size",
                    )
                write(file.fileno(), piece)
                digest.update(piece)
                upload.written += len(piece)
                upload.moved = time.monotonic()
            if digest.hexdigest() != said.payload:
                upload.path.unlink()
                raise Refused(
                    "W601",
                    f"an update of {said.size} bytes that does not match its hash",
                    "the bytes that were signed",
                    "send it again",
                )
            os.fsync(file.fileno())
        self.allowed.check(upload.peer)  # it may have been revoked meanwhile
        store.adopt(upload.path, said.payload)
        try:
            signed = self.server_store.ledger.accept(
                said, upload.signature, upload.peer, upload.certificate,
                lambda row, now: receipt.write(said, row, now, self.coordinator),
                lambda: store.has(said.payload),
            )  # fmt: skip
        except FedtuneError:
            with contextlib.suppress(OSError):
                if not self.server_store.ledger.wanted(said.payload):
                    store.path(said.payload).replace(upload.path)  # as it was before: it may be tried again
            raise
        seconds = time.monotonic() - upload.began
        row = receipt.read(signed, self.coordinator.authority).row
        self.tell(
            UpdateAccepted(
                said.run, said.round, said.verb, said.client, row, said.size, seconds, upload.resumed
            )
        )
        return signed

    @contextlib.contextmanager
    def _disk(self, upload: Upload) -> Iterator[None]:
        """A disk that is full now may have room later; what was written stays."""
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            left = upload.envelope.size - upload.written
            raise NoRoom(
                f"no room for {left} more bytes on the coordinator's disk ({error.strerror})",
                "room for the update",
                30.0,
            ) from error

    def cut_stalled(self) -> None:
        """End uploads that have not moved for too long."""
        with self._lock:
            stalled = [
                u
                for u in self.active.values()
                if u.reserved and time.monotonic() - u.moved > self.limits.stall_seconds
            ]  # not those that wait
        for upload in stalled:
            upload.cancel()


def write(handle: int, data: bytes) -> None:
    """All of it, or OSError."""
    view = memoryview(data)
    while view:
        view = view[os.write(handle, view) :]


def one_by_one(client: str) -> NoRoom:
    return NoRoom(f"a second upload of '{client}' at the same time", "one after the other", IDLE)

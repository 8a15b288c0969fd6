"""What a client has finished and has no receipt for: kept on disk, so that it is sent later instead of being
computed again.

    NAME.update    the bytes
    NAME.envelope  what was signed about them, and the signature
    NAME.receipt   the coordinator's signed word; update and envelope are gone then
    NAME.refused   why the coordinator will never take it; the same
    sequence       this client's own count

NAME is a hash of run, round, verb and attempt: one answer a question.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from fedtune.errors import FedtuneError
from fedtune.exchange.objects import digest_of
from fedtune.forms import Sha256
from fedtune.trust import Envelope, Identity, Signed, Ticket, envelope, private


@dataclass(frozen=True)
class Finished:
    """An update that waits to be sent."""

    name: str
    envelope: Envelope
    signature: bytes
    path: Path
    address: str


def name_of(ticket: Ticket) -> str:
    return hashlib.sha256(
        json.dumps([ticket.run, ticket.round, ticket.verb, ticket.attempt]).encode()
    ).hexdigest()[:32]


class Outbox:
    """One client's folder; one process at a time."""

    def __init__(self, folder: Path, identity: Identity) -> None:
        self.folder, self.identity = folder, identity
        private.make_folder(folder)

    def count(self, above: int = 0) -> int:
        """The next count, above a number that is known to be taken; on disk before it is used. Raises
        R404."""
        path = self.folder / "sequence"
        held = path.read_text() if path.exists() else ""
        number = max(int(held) if held.isdecimal() else 0, above) + 1
        private.write(path, str(number).encode())
        return number

    def keep(self, ticket: Ticket, data: bytes) -> Finished:
        """A finished update, signed and on disk. Raises R404."""
        name, payload = name_of(ticket), Sha256(hashlib.sha256(data).hexdigest())
        said = Envelope(
            self.identity.name.federation,
            ticket.run,
            ticket.round,
            ticket.client,
            ticket.verb,
            ticket.base,
            ticket.given,
            payload,
            len(data),
            self.count(),
            envelope.new_nonce(),
            ticket.protocol,
        )
        self._remove(name)  # an earlier answer to the same question must not stand beside this one's envelope
        private.write(self.folder / f"{name}.update", data)
        return self._sign(name, said, ticket.address)

    def sign_again(self, finished: Finished, above: int) -> Finished:
        """The same update under a new count: after a rotation of keys, or where the old one was taken."""
        said = replace(finished.envelope, sequence=self.count(above), nonce=envelope.new_nonce())
        return self._sign(finished.name, said, finished.address)

    def _sign(self, name: str, said: Envelope, address: str) -> Finished:
        signature = envelope.sign(said, self.identity)
        tree = {
            "envelope": base64.b64encode(said.encode()).decode(),
            "signature": base64.b64encode(signature).decode(),
            "address": address,
        }
        private.write(self.folder / f"{name}.envelope", json.dumps(tree).encode())
        return Finished(name, said, signature, self.folder / f"{name}.update", address)

    def finished(self, ticket: Ticket) -> Finished | None:
        """The update that answers a question, if it waits here."""
        return self._read(name_of(ticket))

    def waiting(self) -> Iterator[Finished]:
        """All updates without a receipt, oldest count first."""
        found = [self._read(path.stem) for path in self.folder.glob("*.envelope")]
        yield from sorted((f for f in found if f), key=lambda f: f.envelope.sequence)

    def receipt(self, ticket: Ticket) -> Signed | None:
        path = self.folder / f"{name_of(ticket)}.receipt"
        return Signed.from_json(path.read_bytes()) if path.exists() else None

    def damaged(self, finished: Finished) -> bool:
        """Whether an update's bytes are no longer those that were signed; it is then dropped, to be computed
        again."""
        try:
            right = digest_of(finished.path) == finished.envelope.payload
        except OSError:
            right = False
        if not right:
            self._remove(finished.name)
        return not right

    def settle(self, finished: Finished, signed: Signed) -> None:
        """The receipt is held: the update is no longer needed."""
        private.write(self.folder / f"{finished.name}.receipt", signed.to_json())
        self._remove(finished.name)

    def give_up(self, finished: Finished, error: FedtuneError) -> None:
        """The coordinator will never take it: keep the reason only."""
        private.write(self.folder / f"{finished.name}.refused", f"{error}\n".encode())
        self._remove(finished.name)

    def _remove(self, name: str) -> None:
        """The envelope first: an update without one is a write that was cut, an envelope without an update
        would be a lie."""
        (self.folder / f"{name}.envelope").unlink(missing_ok=True)
        (self.folder / f"{name}.update").unlink(missing_ok=True)

    def _read(self, name: str) -> Finished | None:
        """None where there is none, or where it is damaged: it is computed again then."""
        try:
            tree = json.loads((self.folder / f"{name}.envelope").read_bytes())
            said = envelope.decode(base64.b64decode(tree["envelope"]))
            signature, address = base64.b64decode(tree["signature"]), str(tree["address"])
            path = self.folder / f"{name}.update"
            right = path.stat().st_size == said.size  # its hash is checked where it arrives
        except (OSError, ValueError, KeyError, TypeError, FedtuneError):
            return None
        return Finished(name, said, signature, path, address) if right else None

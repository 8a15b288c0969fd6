"""The coordinator's signed word that an update is safe and counts: the client keeps it as its proof of
inclusion."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

from cryptography import x509

from fedtune.errors import Refused
from fedtune.trust import canonical
from fedtune.trust.envelope import PROTOCOL, Envelope
from fedtune.trust.identity import Identity
from fedtune.trust.signed import Signed, check, seal

TAG = b"fedtune receipt v1"
FORMS: dict[str, canonical.Form] = {
    "protocol": "number",
    "federation": "text",
    "run": "text",
    "round": "number",
    "client": "text",
    "verb": "text",
    "envelope": "text",
    "payload": "text",
    "size": "number",
    "row": "number",
    "accepted": "number",
}


@dataclass(frozen=True)
class Receipt:
    """What was accepted.

    envelope   SHA-256 (hex) of the client's signed envelope
    payload    SHA-256 (hex) of the update, size its bytes
    row        number of the entry in the coordinator's book
    accepted   microseconds since 1970 by the coordinator's clock
    """

    federation: str
    run: str
    round: int
    client: str
    verb: str
    envelope: str
    payload: str
    size: int
    row: int
    accepted: int
    protocol: int = PROTOCOL

    def encode(self) -> bytes:
        return canonical.join(TAG, [(form, getattr(self, name)) for name, form in FORMS.items()])


def write(envelope: Envelope, row: int, accepted: datetime, coordinator: Identity) -> Signed:
    """The receipt for an accepted envelope."""
    micros = int(accepted.timestamp()) * 1_000_000 + accepted.microsecond
    about = (
        envelope.run,
        envelope.round,
        envelope.client,
        envelope.verb,
        envelope.digest,
        envelope.payload,
        envelope.size,
    )
    return seal(Receipt(coordinator.name.federation, *about, row, micros).encode(), coordinator)


def read(signed: Signed, authority: x509.Certificate, envelope: Envelope | None = None) -> Receipt:
    """A receipt that the federation's coordinator signed, and, if given, for this envelope or an earlier one
    of the same update.

    Raises T704, T705, T707, Refused W601, W604.
    """
    receipt = Receipt(**canonical.part(TAG, signed.record, FORMS))  # type: ignore[arg-type]  # FORMS gives the types
    if receipt.accepted >= 1 << 53:
        raise canonical.damaged("a time after the year 2255")
    check(signed, authority, datetime.fromtimestamp(receipt.accepted // 1_000_000, UTC), "receipt")
    if envelope is not None:
        for field in ("federation", "run", "round", "client", "verb", "payload", "size"):
            if getattr(receipt, field) != getattr(envelope, field):
                raise Refused(
                    "W604",
                    f"a receipt for {field} {getattr(receipt, field)!r}",
                    f"{getattr(envelope, field)!r}",
                    "send the update again",
                )
    return receipt

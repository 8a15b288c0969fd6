"""The signed envelope of an update: who answers what, on which base, with which bytes.

The bytes that are signed (Ed25519, RFC 8032) are the bytes that travel: there is no second form that a
signature might not cover.
"""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import dataclass

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ed25519

from fedtune.errors import FedtuneError, Refused
from fedtune.forms import MemberName, RunName, Sha256, VerbName, sha256_or_nothing
from fedtune.trust import canonical
from fedtune.trust.certificates import Peer
from fedtune.trust.identity import Identity

TAG = b"fedtune envelope v1"
OLDEST, PROTOCOL = (
    1,
    1,
)  # what is read, and what is written: a version and the one before it understand each other
NONCE = 16  # bytes
FORMS: dict[str, canonical.Form] = {
    "protocol": "number",
    "federation": "text",
    "run": "text",
    "round": "number",
    "client": "text",
    "verb": "text",
    "base": "text",
    "given": "text",
    "payload": "text",
    "size": "number",
    "sequence": "number",
    "nonce": "bytes",
}


@dataclass(frozen=True)
class Envelope:
    """What a client says about its update.

    federation, client   as in its certificate
    run, round, verb     what was asked
    base                 fingerprint of the frozen base model, "" where there is none
    given                SHA-256 (hex) of the state that the update answers
    payload, size        SHA-256 (hex) and bytes of the update
    sequence             the client's own count, below 2**63
    nonce                16 random bytes: the same update signed twice is two envelopes
    """

    federation: str
    run: RunName
    round: int
    client: MemberName
    verb: VerbName
    base: str
    given: Sha256
    payload: Sha256
    size: int
    sequence: int
    nonce: bytes
    protocol: int = PROTOCOL

    def __post_init__(self) -> None:
        """Raises Refused W601 for words that are none: an envelope names files at the coordinator."""
        for name, form in (
            ("run", RunName),
            ("client", MemberName),
            ("verb", VerbName),
            ("given", Sha256),
            ("payload", Sha256),
        ):
            object.__setattr__(self, name, form(getattr(self, name)))
        sha256_or_nothing(self.base)

    def encode(self) -> bytes:
        """Raises ValueError for values that have no encoding."""
        return canonical.join(TAG, [(form, getattr(self, name)) for name, form in FORMS.items()])

    @property
    def digest(self) -> Sha256:
        """SHA-256 (hex) of the signed bytes: the envelope's name."""
        return Sha256(hashlib.sha256(self.encode()).hexdigest())

    def require(self, **asked: str | int) -> None:
        """Raises Refused W604 with the first field that is not as asked."""
        for field, value in asked.items():
            if (found := getattr(self, field)) != value:
                raise Refused(
                    "W604",
                    f"{field} {str(found)[:80]!r}",
                    f"{str(value)[:80]!r}",
                    "answer what was asked, in the round in which it was asked",
                )


def new_nonce() -> bytes:
    return secrets.token_bytes(NONCE)


def decode(data: bytes) -> Envelope:
    """Raises Refused W601, W602, W606."""
    values = canonical.part(TAG, data, FORMS)
    require_spoken(values["protocol"])
    envelope = Envelope(**values)  # type: ignore[arg-type]  # FORMS gives the types
    if len(envelope.nonce) != NONCE:
        raise canonical.damaged(f"a nonce of {len(envelope.nonce)} bytes")
    for field in ("round", "size", "sequence"):
        if getattr(envelope, field) >= 1 << 63:
            raise Refused(
                "W606", f"{field} {getattr(envelope, field)}", "less than 2**63", "check the sender"
            )
    return envelope


def require_spoken(protocol: canonical.Value) -> None:
    """Raises Refused W602."""
    if not isinstance(protocol, int) or not OLDEST <= protocol <= PROTOCOL:
        known = f"protocol {PROTOCOL}" if OLDEST == PROTOCOL else f"protocol {OLDEST} to {PROTOCOL}"
        raise Refused(
            "W602", f"protocol {protocol!r}", known, "install the same version of fedtune on both sides"
        )


def sign(envelope: Envelope, identity: Identity) -> bytes:
    """64 bytes."""
    return identity.sign(envelope.encode())


def verified(data: bytes, signature: bytes, peer: Peer) -> Envelope:
    """The envelope in `data`, if this peer signed it about itself. Raises T705, T707, Refused W601, W602."""
    check_signature(peer.signing_key, signature, data, f"envelope of '{peer.name.name}'")
    envelope = decode(data)
    if (envelope.federation, envelope.client) != (peer.name.federation, peer.name.name):
        found = (
            f"an envelope of client {envelope.client[:63]!r} of {envelope.federation[:63]!r} from "
            f"'{peer.name.name}' of '{peer.name.federation}'"
        )
        raise FedtuneError("T705", found, "one of its own", "send your own updates only")
    return envelope


def check_signature(signing_key: bytes, signature: bytes, data: bytes, what: str) -> None:
    """Raises T707."""
    try:
        ed25519.Ed25519PublicKey.from_public_bytes(signing_key).verify(signature, data)
    except (InvalidSignature, ValueError):
        raise FedtuneError(
            "T707",
            f"an {what} whose signature does not match",
            "the bytes that were signed",
            "the message was dropped; send it again",
        ) from None

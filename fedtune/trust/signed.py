"""A record that the coordinator signed, as it travels and is kept: whoever knows the authority can check it,
today or in years."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from datetime import datetime

from cryptography import x509

from fedtune.errors import FedtuneError
from fedtune.forms import read_json
from fedtune.trust.canonical import damaged
from fedtune.trust.certificates import Peer, member_of, read_certificate
from fedtune.trust.envelope import check_signature
from fedtune.trust.identity import Identity
from fedtune.trust.names import COORDINATOR
from fedtune.trust.requests import packed


@dataclass(frozen=True)
class Signed:
    """The signed bytes, the Ed25519 signature, and the certificate (PEM) that proves the key."""

    record: bytes
    signature: bytes
    certificate: bytes

    def to_json(self) -> bytes:
        return packed({"record": self.record, "signature": self.signature, "certificate": self.certificate})

    @classmethod
    def from_json(cls, content: bytes) -> Signed:
        """Raises Refused W601."""
        try:
            tree = read_json(content)
            return cls(
                *(
                    base64.b64decode(tree[name], validate=True)
                    for name in ("record", "signature", "certificate")
                )
            )
        except (ValueError, KeyError, TypeError):
            raise damaged("bytes that are no signed record") from None


def seal(record: bytes, member: Identity) -> Signed:
    return Signed(record, member.sign(record), member.certificate)


def check(signed: Signed, authority: x509.Certificate, at: datetime, what: str) -> None:
    """Raises T704, T705 and T707 unless this federation's coordinator signed it with a certificate that was
    valid at that time."""
    peer = signer(signed, authority, at, what)
    if peer.name.name != COORDINATOR:
        raise FedtuneError(
            "T705",
            f"a {what} of '{peer.name.name}'",
            "one of the coordinator",
            "ask the coordinator's operator",
        )


def signer(signed: Signed, authority: x509.Certificate, at: datetime, what: str) -> Peer:
    """The member of this federation that signed it. Raises T704, T705 and T707."""
    peer = member_of(read_certificate(signed.certificate, f"a {what}"), authority, at)
    check_signature(peer.signing_key, signed.signature, signed.record, what)
    return peer

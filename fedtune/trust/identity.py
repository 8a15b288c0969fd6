"""What a member holds: a folder with its certificate, two private keys, and the authority's certificate.

key.pem           TLS key, ECDSA P-256            0600
signing-key.pem   Ed25519                          0600
certificate.pem   names, hosts, dates, both public keys
authority.pem     whom to believe
allowed.json      the coordinator's folder only
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from fedtune.errors import FedtuneError
from fedtune.trust import private
from fedtune.trust.certificates import Peer, key_hash, member_of, peer_of, read_certificate, utc_now
from fedtune.trust.names import COORDINATOR, Name

KEY, SIGNING_KEY, CERTIFICATE, AUTHORITY, ALLOWED = (
    "key.pem",
    "signing-key.pem",
    "certificate.pem",
    "authority.pem",
    "allowed.json",
)
PASSPHRASE, AUTHORITY_PASSPHRASE = "FEDTUNE_PASSPHRASE", "FEDTUNE_AUTHORITY_PASSPHRASE"

Passphrase = Callable[[Path], str | None]  # the encrypted file -> its passphrase, None: there is none
PrivateKey = ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey


def from_environment(path: Path) -> str | None:
    """The passphrase of a program that nobody sits in front of. Never an argument: those are visible to every
    user of a machine."""
    return os.environ.get(variable_of(path))


def variable_of(path: Path) -> str:
    """The environment variable that holds the passphrase of an encrypted key: the authority has one of its
    own."""
    return AUTHORITY_PASSPHRASE if path.parent.name == "authority" else PASSPHRASE


@dataclass(frozen=True)
class Identity:
    """A member's keys in memory, decrypted."""

    peer: Peer
    folder: Path
    certificate: bytes  # PEM
    authority: x509.Certificate
    key: bytes = field(repr=False)  # PEM, not encrypted
    signer: ed25519.Ed25519PrivateKey = field(repr=False)

    @property
    def name(self) -> Name:
        return self.peer.name

    @property
    def authority_pem(self) -> bytes:
        return self.authority.public_bytes(serialization.Encoding.PEM)

    @property
    def is_coordinator(self) -> bool:
        return self.name.name == COORDINATOR

    def sign(self, data: bytes) -> bytes:
        """Ed25519 (RFC 8032), 64 bytes."""
        return self.signer.sign(data)


def load(folder: Path, passphrase: Passphrase = from_environment, now: datetime | None = None) -> Identity:
    """A member's folder, checked: modes, that the parts belong together, and dates. Raises T701 to T705."""
    private.require_private(folder)
    key = read_key(folder / KEY, passphrase)
    signer = read_key(folder / SIGNING_KEY, passphrase)
    certificate = read_certificate(private.read_public(folder / CERTIFICATE), f"'{folder / CERTIFICATE}'")
    authority = read_certificate(private.read_public(folder / AUTHORITY), f"'{folder / AUTHORITY}'")
    peer = member_of(certificate, authority, now or utc_now())
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key_hash(key.public_key()) != peer.key:
        raise mixed(folder / KEY)
    if (
        not isinstance(signer, ed25519.Ed25519PrivateKey)
        or signer.public_key().public_bytes_raw() != peer.signing_key
    ):
        raise mixed(folder / SIGNING_KEY)
    return Identity(
        peer,
        folder,
        certificate.public_bytes(serialization.Encoding.PEM),
        authority,
        to_pem(key, None),
        signer,
    )


def following(folder: Path, passphrase: Passphrase = from_environment) -> Callable[[], Identity]:
    """The folder's identity as it is now: read again when its certificate was renewed. Raises T701 to T705 at
    once; later, keys that cannot be read leave those of before."""
    held, stamp = load(folder, passphrase), (folder / CERTIFICATE).stat().st_mtime_ns

    def now() -> Identity:
        nonlocal held, stamp
        with contextlib.suppress(OSError, FedtuneError):
            found = (folder / CERTIFICATE).stat().st_mtime_ns
            if found != stamp:
                held, stamp = load(folder, passphrase), found
        return held

    return now


def read_key(path: Path, passphrase: Passphrase) -> PrivateKey:
    """Raises T701, T702, T703."""
    content = private.read(path)
    secret = None
    if b"ENCRYPTED" in content:
        secret = passphrase(path)
        if not secret:
            raise FedtuneError(
                "T703",
                f"an encrypted key '{path}' and no passphrase",
                "its passphrase",
                f"set {variable_of(path)}, or run this in a terminal",
            )
    try:
        key = serialization.load_pem_private_key(content, secret.encode() if secret else None)
    except (ValueError, TypeError):
        if secret:
            raise FedtuneError(
                "T703", sentence=f"the passphrase does not open '{path}'", do="try again"
            ) from None
        raise FedtuneError(
            "T702",
            f"'{path}', which is not a private key",
            "a key in PEM (PKCS 8)",
            "copy it again, or: fedtune keys renew NAME",
        ) from None
    if not isinstance(key, ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey):
        raise FedtuneError(
            "T702",
            f"a key of another kind in '{path}'",
            "the key that fedtune keys made",
            "copy the folder of this name again",
        )
    return key


def to_pem(key: PrivateKey, passphrase: str | None) -> bytes:
    """PKCS 8; with a passphrase, encrypted by the best that OpenSSL offers."""
    how: serialization.KeySerializationEncryption = serialization.NoEncryption()
    if passphrase:
        how = serialization.BestAvailableEncryption(passphrase.encode())
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, how)


def mixed(path: Path) -> FedtuneError:
    return FedtuneError(
        "T702",
        f"a key '{path}' that does not belong to its certificate",
        "files of one folder made by fedtune keys",
        "copy the whole folder again",
    )


def peer_from_tls(pem: bytes, federation: str) -> Peer:
    """Who is at the other end, from the certificate that TLS has verified against the authority. Raises
    T705."""
    peer = peer_of(read_certificate(pem, "a TLS connection"))
    if peer.name.federation != federation:
        raise FedtuneError(
            "T705",
            f"a certificate for federation {peer.name.federation!r}",
            f"one for {federation!r}",
            "connect to the right coordinator",
        )
    return peer

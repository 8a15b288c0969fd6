"""X.509 certificates of a federation: one private authority, the coordinator, and the clients.

TLS keys are ECDSA P-256: BoringSSL inside grpc offers no Ed25519 in its handshakes
(NO_COMMON_SIGNATURE_ALGORITHMS, grpcio 1.85).
Messages are signed with Ed25519; that public key stands in an extension of the same certificate, so one
signature of the
authority ties name, TLS key and signing key together, and a receipt can be checked with the authority's
certificate alone.
"""

from __future__ import annotations

import hashlib
import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedtune.errors import FedtuneError
from fedtune.trust.names import COORDINATOR, Name

SIGNING = x509.ObjectIdentifier(
    "2.25.112042992094047583066179943196927878855"
)  # a UUID's OID (ITU-T X.667): no registry is needed
SKEW = timedelta(hours=1)  # a certificate is valid this long before it is made, for clocks that are behind
AUTHORITY_DAYS = 3650


@dataclass(frozen=True)
class Peer:
    """What a certificate says about its holder.

    key          SHA-256 of the TLS public key (SubjectPublicKeyInfo, DER), hex: what the allow list holds
    signing_key  Ed25519 public key, 32 bytes
    """

    name: Name
    key: str
    signing_key: bytes
    starts: datetime
    ends: datetime


def make_authority(federation: str, key: ec.EllipticCurvePrivateKey, now: datetime) -> x509.Certificate:
    """The self-signed root. It may sign members, and nothing that signs further (path length 0)."""
    subject = x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, federation),
            x509.NameAttribute(NameOID.COMMON_NAME, "fedtune authority"),
        ]
    )
    builder = blank(subject, subject, key.public_key(), now, AUTHORITY_DAYS)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(usage(sign_certificates=True), critical=True)
    builder = builder.add_extension(
        x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False
    )
    return builder.sign(key, hashes.SHA256())


def make_member(
    name: Name,
    public_key: ec.EllipticCurvePublicKey,
    signing_key: ed25519.Ed25519PublicKey,
    authority: x509.Certificate,
    authority_key: ec.EllipticCurvePrivateKey,
    now: datetime,
    days: int,
    hosts: Sequence[str] = (),
) -> x509.Certificate:
    """A certificate for the coordinator (with `hosts`, the names and addresses that clients may call it by)
    or for a client."""
    subject = x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, name.federation),
            x509.NameAttribute(NameOID.COMMON_NAME, name.name),
        ]
    )
    names: list[x509.GeneralName] = [
        x509.UniformResourceIdentifier(name.uri),
        *(host(text) for text in hosts),
    ]
    roles = [ExtendedKeyUsageOID.CLIENT_AUTH]
    if name.name == COORDINATOR:  # who also asks its own exchange for the status
        roles.append(ExtendedKeyUsageOID.SERVER_AUTH)
    raw = signing_key.public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
    builder = blank(subject, authority.subject, public_key, now, days)
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    builder = builder.add_extension(usage(sign_certificates=False), critical=True)
    builder = builder.add_extension(x509.ExtendedKeyUsage(roles), critical=False)
    builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    builder = builder.add_extension(x509.UnrecognizedExtension(SIGNING, raw), critical=False)
    builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
    builder = builder.add_extension(
        x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key()), critical=False
    )
    return builder.sign(authority_key, hashes.SHA256())


def blank(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, now: datetime, days: int
) -> x509.CertificateBuilder:
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
    )
    return builder.not_valid_before(now - SKEW).not_valid_after(now + timedelta(days=days))


def usage(sign_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not sign_certificates,
        key_cert_sign=sign_certificates,
        crl_sign=False,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def host(text: str) -> x509.GeneralName:
    """An address or a DNS name as a certificate holds it. Raises T708."""
    try:
        return x509.IPAddress(ipaddress.ip_address(text))
    except ValueError:
        pass
    try:
        if not text or len(text) > 253 or any(sign in text for sign in "/: "):
            raise ValueError
        return x509.DNSName(text)
    except ValueError:
        raise FedtuneError(
            "T708", f"host {text[:80]!r}", "a DNS name or an IP address, without a port", "correct --host"
        ) from None


def read_certificate(pem: bytes, where: str) -> x509.Certificate:
    """Raises T702."""
    try:
        return x509.load_pem_x509_certificate(pem)
    except ValueError:
        raise FedtuneError(
            "T702",
            f"{where} without a certificate",
            "a certificate in PEM",
            "copy it again, or run: fedtune keys renew NAME",
        ) from None


def key_hash(key: ec.EllipticCurvePublicKey) -> str:
    return hashlib.sha256(
        key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    ).hexdigest()


def member_of(certificate: x509.Certificate, authority: x509.Certificate, now: datetime) -> Peer:
    """What a member's certificate says, once it is known to be true. Raises T704 (dates), T705 (not of this
    authority, or not a member's)."""
    try:
        certificate.verify_directly_issued_by(authority)
    except (InvalidSignature, ValueError, TypeError):
        raise stranger(f"a certificate of {who(certificate)} that {who(authority)} did not sign") from None
    peer = peer_of(certificate)
    if peer.name.federation != federation_of(authority):
        raise stranger(f"a certificate for federation {peer.name.federation!r}")
    if not peer.starts <= now <= peer.ends:
        raise outdated(peer, now)
    return peer


def peer_of(certificate: x509.Certificate) -> Peer:
    """What a certificate says, whoever signed it: for peers that TLS has already checked. Raises T705."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        extension = certificate.extensions.get_extension_for_oid(SIGNING).value
    except (x509.ExtensionNotFound, ValueError):
        raise stranger(f"a certificate of {who(certificate)} without name or signing key") from None
    uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    name = Name.from_uri(uris[0]) if len(uris) == 1 else None
    key = certificate.public_key()
    if (
        name is None
        or not isinstance(key, ec.EllipticCurvePublicKey)
        or not isinstance(extension, x509.UnrecognizedExtension)
        or len(extension.value) != 32
    ):
        raise stranger(f"a certificate of {who(certificate)} that is no member's")
    return Peer(
        name,
        key_hash(key),
        extension.value,
        certificate.not_valid_before_utc,
        certificate.not_valid_after_utc,
    )


def federation_of(authority: x509.Certificate) -> str:
    found = authority.subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME)
    return str(found[0].value) if found else ""


def who(certificate: x509.Certificate) -> str:
    return repr(certificate.subject.rfc4514_string()[:120])


def stranger(found: str) -> FedtuneError:
    return FedtuneError(
        "T705",
        found,
        "a certificate that this federation's authority signed",
        "use the folder that fedtune keys made for this federation",
    )


def outdated(peer: Peer, now: datetime) -> FedtuneError:
    if now < peer.starts:
        found = (
            f"a certificate of '{peer.name.name}' that is valid from {peer.starts:%Y-%m-%d %H:%M} UTC, and a "
            f"clock that says {now:%Y-%m-%d %H:%M} UTC"
        )
        return FedtuneError("T704", found, "a certificate that is valid now", "set this machine's clock")
    found = (
        f"a certificate of '{peer.name.name}' that expired {peer.ends:%Y-%m-%d %H:%M} UTC (this clock says "
        f"{now:%Y-%m-%d %H:%M} UTC)"
    )
    return FedtuneError(
        "T704",
        found,
        "a certificate that is valid now",
        f"run: fedtune keys renew {peer.name.name}, and copy the new folder",
    )


def utc_now() -> datetime:
    return datetime.now(UTC)

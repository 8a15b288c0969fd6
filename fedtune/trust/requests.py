"""Keys that are made where they are used: a site asks, the operator signs, the site accepts. No private key
leaves its machine.

    site        fedtune keys request site-a --federation hospitals    site-a/key.pem, signing-key.pem (0600),
                site-a.request
    operator    fedtune keys sign site-a.request                      site-a.answer: certificate, the
                authority's certificate
    site        fedtune keys accept site-a.answer --to site-a         site-a/certificate.pem, authority.pem

A request is signed by both of its keys, so that nobody asks for a certificate of keys that are somebody
else's.
"""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from fedtune.errors import FedtuneError, Refused
from fedtune.forms import read_json
from fedtune.trust import canonical, private
from fedtune.trust.certificates import key_hash, peer_of, read_certificate
from fedtune.trust.identity import (
    AUTHORITY,
    CERTIFICATE,
    KEY,
    SIGNING_KEY,
    Identity,
    Passphrase,
    from_environment,
    load,
    read_key,
    to_pem,
)
from fedtune.trust.names import checked

TAG = b"fedtune key request v1"
FORMS: dict[str, canonical.Form] = {
    "federation": "text",
    "name": "text",
    "key": "bytes",
    "signing_key": "bytes",
}
LONGEST = 4 << 20  # bytes of a request or an answer
MEMBERS = "members.signed"


@dataclass(frozen=True)
class Request:
    """What a site asks to have signed."""

    federation: str
    name: str
    key: ec.EllipticCurvePublicKey
    signing_key: ed25519.Ed25519PublicKey


def make(folder: Path, federation: str, name: str, passphrase: str | None = None) -> tuple[Path, str]:
    """New keys in `folder`, the request beside it, and the request's mark. Raises T708 where there are keys,
    R404."""
    checked(federation, "federation")
    checked(name, "name")
    if (folder / KEY).exists():
        raise FedtuneError("T708", f"keys in '{folder}'", "a folder without", "choose another with --to")
    key, signer = ec.generate_private_key(ec.SECP256R1()), ed25519.Ed25519PrivateKey.generate()
    raw = key.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    record = canonical.join(
        TAG,
        [
            ("text", federation),
            ("text", name),
            ("bytes", raw),
            ("bytes", signer.public_key().public_bytes_raw()),
        ],
    )
    parts = {
        "record": record,
        "signature": signer.sign(record),
        "proof": key.sign(record, ec.ECDSA(hashes.SHA256())),
    }
    content = packed(parts)
    private.make_folder(folder)
    private.write(folder / KEY, to_pem(key, passphrase))
    private.write(folder / SIGNING_KEY, to_pem(signer, passphrase))
    path = folder.with_name(f"{checked(name, 'name')}.request")
    private.write(path, content, 0o644)
    return path, mark(content)


def read(content: bytes) -> Request:
    """A request that both of its keys have signed. Raises T702, T707."""
    parts = unpacked(content, "request", ("record", "signature", "proof"))
    try:
        said = canonical.part(TAG, parts["record"], FORMS)
        key = serialization.load_der_public_key(bytes(said["key"]))  # type: ignore[arg-type]
        signing = ed25519.Ed25519PublicKey.from_public_bytes(bytes(said["signing_key"]))  # type: ignore[arg-type]
        if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
            raise ValueError
        signing.verify(parts["signature"], parts["record"])
        key.verify(parts["proof"], parts["record"], ec.ECDSA(hashes.SHA256()))
    except InvalidSignature:
        raise FedtuneError(
            "T707",
            "a request whose signatures do not match",
            "one that its own keys signed",
            "run fedtune keys request again",
        ) from None
    except (ValueError, Refused):
        raise FedtuneError(
            "T702",
            "a request that cannot be read",
            "the file that fedtune keys request made",
            "copy it again",
        ) from None
    return Request(str(said["federation"]), str(said["name"]), key, signing)


def mark(content: bytes) -> str:
    """What both ends read to each other: 16 hexadecimal digits of the request's hash, in fours."""
    digits = hashlib.sha256(unpacked(content, "request", ("record",))["record"]).hexdigest()[:16]
    return "-".join(digits[at : at + 4] for at in range(0, 16, 4))


def answer(certificate: bytes, authority: bytes, members: bytes) -> bytes:
    """What goes back to the site, the signed list of members (roster.py) with it: nothing in it is secret."""
    return packed({"certificate": certificate, "authority": authority, "members": members})


def accept(folder: Path, content: bytes, passphrase: Passphrase = from_environment) -> Identity:
    """Put the certificates beside the keys that they are for. Raises T701 to T705; nothing is written
    then."""
    parts = unpacked(content, "answer", ("certificate", "authority", "members"))
    key = read_key(folder / KEY, passphrase)
    if (
        not isinstance(key, ec.EllipticCurvePrivateKey)
        or key_hash(key.public_key()) != peer_of(read_certificate(parts["certificate"], "the answer")).key
    ):
        raise FedtuneError(
            "T702",
            f"an answer for other keys than those in '{folder}'",
            "the answer to their request",
            "copy the right file",
        )
    private.write(folder / AUTHORITY, parts["authority"], 0o644)
    private.write(folder / CERTIFICATE, parts["certificate"], 0o644)
    private.write(folder / MEMBERS, parts["members"], 0o644)
    return load(folder, passphrase)


def packed(parts: dict[str, bytes]) -> bytes:
    tree = {name: base64.b64encode(part).decode() for name, part in parts.items()}
    return (json.dumps(tree) + "\n").encode()


def unpacked(content: bytes, what: str, names: tuple[str, ...]) -> dict[str, bytes]:
    """Raises T702."""
    try:
        tree = read_json(content)
        return {name: base64.b64decode(tree[name], validate=True) for name in names}
    except (ValueError, KeyError, TypeError):
        raise FedtuneError(
            "T702",
            f"a file that is not a valid {what}",
            f"the {what} as fedtune keys wrote it",
            "copy it again",
        ) from None


def content_of(path: Path) -> bytes:
    """Raises T702."""
    content = private.read_public(path)
    if len(content) > LONGEST:
        raise FedtuneError(
            "T702", f"a file of {len(content)} bytes at '{path}'", f"at most {LONGEST}", "copy the right file"
        )
    return content

"""Keys of weeks, renewed by themselves: the site makes new keys, its present keys vouch for them, the
authority signs, the site goes over to them.

    site          HOME/keys/HASH/            new keys, made there; they never leave it
    coordinator   HOME/renewals/NAME.request what it was handed, and hands on; it can sign nothing itself
    authority     fedtune keys renewals      by a timer, where the authority's key is: NAME.answer
    coordinator   -> site                    with its ordinary calls

The authority stays apart from the coordinator: the folder of requests may lie on another machine, and be
copied there and back. It signs what a key vouches for that is on its allow list, valid now and in the second
half of its life, for the same name, and at most three keys of a name at a time.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from cryptography import x509

from fedtune.errors import FedtuneError, Refused
from fedtune.forms import MemberName
from fedtune.trust import private, requests, roster
from fedtune.trust.allowed import read_entries
from fedtune.trust.authority import Authority
from fedtune.trust.certificates import Peer, key_hash, member_of, peer_of, read_certificate, utc_now
from fedtune.trust.identity import CERTIFICATE, KEY, Identity, Passphrase, from_environment, load
from fedtune.trust.signed import Signed, seal, signer

FOLDER = "renewals"  # in a coordinator's home
KEYS, NEXT = "keys", "next"  # in a site's home
LONGEST = 8192  # bytes of a request, or of an answer without its list of members
AGAIN = 60.0  # seconds before a member may hand in another one
AT_ONCE = 3  # valid keys of one name: the present one, the next, and one whose machine was lost on the way


def left(peer: Peer, now: datetime) -> float:
    """The part of a certificate's life that is still to come."""
    return (peer.ends - now) / (peer.ends - peer.starts)


# --- the site ---


def newest(keys: Path, home: Path, passphrase: Passphrase = from_environment) -> Identity:
    """The site's identity: the keys that it was given, or those that it has renewed since. Raises T701 to
    T705 where none can be used."""
    given = peer_of(read_certificate(private.read_public(keys / CERTIFICATE), f"'{keys / CERTIFICATE}'"))
    found = []
    for place in sorted((home / KEYS).glob("*/")):
        if place.name != NEXT and (place / CERTIFICATE).exists():
            try:
                found.append(load(place, passphrase))
            except FedtuneError:  # ended, or damaged: another one will do
                continue
    later = [one for one in found if one.name == given.name and one.peer.starts > given.starts]
    return max(later, key=lambda one: one.peer.starts) if later else load(keys, passphrase)


def asked(identity: Identity, home: Path, now: datetime | None = None) -> bytes:
    """The request for new keys, where a third of the present ones' life is left or less; b"" before that. The
    same one until it is answered. Raises R404."""
    if left(identity.peer, now or utc_now()) > 1 / 3:
        return b""
    place = home / KEYS / NEXT
    path = place.with_name(f"{identity.name.name}.request")
    if not ((place / KEY).exists() and path.exists()):
        private.make_folder(home / KEYS)
        for leftover in (place / KEY, place / "signing-key.pem"):
            leftover.unlink(missing_ok=True)
        encrypted = b"ENCRYPTED" in private.read(identity.folder / KEY)
        secret = from_environment(identity.folder / KEY) if encrypted else None
        requests.make(place, identity.name.federation, identity.name.name, secret)
    return seal(path.read_bytes(), identity).to_json()


def accept(
    answer: bytes, identity: Identity, home: Path, passphrase: Passphrase = from_environment
) -> Identity:
    """Go over to the renewed keys. Raises T702, T704, T705 for an answer that is not this authority's, for
    this name and these keys; nothing has changed then."""
    place = home / KEYS / NEXT
    parts = requests.unpacked(answer, "answer", ("certificate", "authority", "members"))
    certificate = read_certificate(parts["certificate"], "the answer")
    peer = member_of(certificate, identity.authority, utc_now())
    if peer.name != identity.name or parts["authority"] != identity.authority_pem:
        raise FedtuneError(
            "T705",
            f"renewed keys for '{peer.name.name}', or of another authority",
            f"those of '{identity.name.name}'",
            "they were ignored; ask the coordinator's operator",
        )
    roster.read(parts["members"], identity.authority, identity.name.federation)
    requests.accept(place, answer, passphrase)
    final = home / KEYS / peer.key[:16]
    place.rename(final)
    place.with_name(f"{identity.name.name}.request").unlink(missing_ok=True)
    return load(final, passphrase)


# --- the coordinator ---


@dataclass(frozen=True)
class Desk:
    """Where requests are kept for the authority, and its answers for the sites."""

    folder: Path

    def hand_in(self, peer: Peer, content: bytes, identity: Identity) -> bytes:
        """Keep a member's own request; the answer to it, b"" where there is none yet. Raises T702, T704,
        T705, T707, Refused W601, W606."""
        by, wanted, _ = read_request(content, identity.authority, utc_now())
        if by.name != peer.name:
            raise not_its_own(wanted, by)
        name = MemberName(peer.name.name)
        path = self.folder / f"{name}.request"
        if not path.exists() or path.read_bytes() != content:
            if path.exists() and time.time() < path.stat().st_mtime + AGAIN:
                return b""
            private.make_folder(self.folder)
            private.write(path, content, 0o644)
        answer = self.folder / f"{name}.answer"
        if not answer.exists():
            return b""
        certificate = requests.unpacked(answer.read_bytes(), "answer", ("certificate",))["certificate"]
        same = member_of(read_certificate(certificate, "an answer"), identity.authority, utc_now()).key
        return answer.read_bytes() if same == key_hash(wanted.key) else b""


# --- both of them ---


def read_request(
    content: bytes, authority: x509.Certificate, now: datetime
) -> tuple[Peer, requests.Request, bytes]:
    """Who vouches with its present keys, for which new ones of its own name, and the record to sign. Raises
    T702, T704, T705, T707, Refused W601, W606."""
    if len(content) > LONGEST:
        found = f"a request of {len(content)} bytes"
        raise Refused("W606", found, f"at most {LONGEST}", "use fedtune client")
    signed = Signed.from_json(content)
    by, wanted = signer(signed, authority, now, "request"), requests.read(signed.record)
    if (wanted.name, wanted.federation) != (by.name.name, by.name.federation):
        raise not_its_own(wanted, by)
    return by, wanted, signed.record


def not_its_own(wanted: requests.Request, by: Peer) -> FedtuneError:
    return FedtuneError(
        "T705",
        f"a request for keys of {wanted.name[:80]!r}, signed by '{by.name.name}'",
        "one for its own name",
        "use fedtune client",
    )


# --- the authority ---


def answered(made: Authority, folder: Path, days: int, now: datetime | None = None) -> Iterator[str]:
    """Sign what waits; a line for each request, with why not where it was not. Raises R404."""
    now = now or utc_now()
    for path in sorted(folder.glob("*.request")):
        try:
            name, answer = signed_answer(made, private.read_public(path), days, now)
        except (FedtuneError, Refused) as error:
            yield f"{path.name}: not signed. {error}"
            continue
        if answer:
            private.write(path.with_name(f"{MemberName(name)}.answer"), answer, 0o644)
            yield f"{path.name}: signed for {days} days"


def signed_answer(made: Authority, content: bytes, days: int, now: datetime) -> tuple[str, bytes]:
    """The name and the answer, b"" where its key was signed before. Raises T704 to T708, Refused W601."""
    by, wanted, record = read_request(content, made.certificate, now)
    entries = read_entries(made.allowed)
    if any(entry.key == key_hash(wanted.key) for entry in entries):
        return wanted.name, b""
    known = next((entry for entry in entries if entry.key == by.key), None)
    if known is None or known.name != by.name.name or known.state(now) != "valid":
        raise FedtuneError(
            "T706",
            f"a request that a key of '{by.name.name}' ({by.key[:12]}) vouches for",
            "a key on the allow list, valid and not revoked",
            "run keys request at the site, and keys sign",
        )
    if left(by, now) > 1 / 2:
        raise FedtuneError(
            "T708",
            sentence=f"the keys of '{by.name.name}' are in the first half of their life",
            do="nothing to do: it asks again",
        )
    if sum(entry.name == by.name.name and entry.state(now) == "valid" for entry in entries) >= AT_ONCE:
        raise FedtuneError(
            "T708",
            sentence=f"'{by.name.name}' has {AT_ONCE} valid keys",
            do=f"revoke those that are not used: fedtune keys revoke {by.name.name} --key HASH",
        )
    return made.sign(record, days, now)


def ends_soon(folder: Path, now: datetime | None = None) -> bool:
    """Whether a third or less is left of the life of the keys in a folder. Raises T702."""
    certificate = read_certificate(private.read_public(folder / CERTIFICATE), f"'{folder / CERTIFICATE}'")
    return left(peer_of(certificate), now or utc_now()) <= 1 / 3

"""The list of members that the authority has signed: who may speak, with which keys, until when. Sites pin
the newest they have seen, so that a key of the
coordinator that was revoked is no longer good there, and an older list is no way back.

The coordinator's allow list (allowed.py) says the same for its own door, and can be changed without the
authority; this one cannot.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from fedtune.errors import FedtuneError, Refused
from fedtune.trust import canonical, private
from fedtune.trust.allowed import Entry
from fedtune.trust.certificates import Peer
from fedtune.trust.requests import MEMBERS, packed, unpacked

FILE = MEMBERS  # beside a coordinator's keys, in a site's keys and in its home
TAG = b"fedtune members v1"
FORMS: dict[str, canonical.Form] = {
    "federation": "text",
    "version": "number",
    "ends": "number",
    "members": "text",
    "recipes": "text",
}


@dataclass(frozen=True)
class Roster:
    """One version of the list. `members`: hash of a key -> name; `recipes`: fingerprints of those that may be
    run, none: every one."""

    federation: str
    version: int
    ends: int
    members: Mapping[str, str]
    content: bytes
    recipes: frozenset[str] = frozenset()

    def check_recipe(self, fingerprint: str) -> None:
        """Raises F507 for a recipe that the authority has not approved, where it approves any."""
        if self.recipes and fingerprint not in self.recipes:
            raise FedtuneError(
                "F507",
                f"recipe {fingerprint}, which version {self.version} of the authority's list does not name",
                "one that it names",
                "ask the operator to run: fedtune keys publish --recipe RECIPE",
            )

    def check(self, peer: Peer, now: datetime) -> None:
        """Raises T704 for a list that has ended, T706 for a key that is not on it."""
        if now.timestamp() > self.ends:
            raise FedtuneError(
                "T704",
                "a list of members that has ended",
                "one that is valid now",
                "ask the operator to run: fedtune keys publish",
            )
        if self.members.get(peer.key) != peer.name.name:
            found = (
                f"a key of '{peer.name.name}' ({peer.key[:12]}) that version {self.version} of the list of "
                "members does not name"
            )
            raise FedtuneError(
                "T706", found, "a valid key", "ask the authority's operator whether it was revoked"
            )


def write(
    federation: str,
    version: int,
    entries: Sequence[Entry],
    key: ec.EllipticCurvePrivateKey,
    now: datetime,
    days: int,
    recipes: Sequence[str] = (),
) -> bytes:
    """The signed list of all keys that may speak now, and of the recipes that may be run, where it names
    any."""
    members = {entry.key: entry.name for entry in entries if entry.state(now) == "valid"}
    ends = int((now + timedelta(days=days)).timestamp())
    record = canonical.join(
        TAG,
        [
            ("text", federation),
            ("number", version),
            ("number", ends),
            ("text", json.dumps(members, sort_keys=True)),
            ("text", json.dumps(sorted(recipes))),
        ],
    )
    return packed({"record": record, "signature": key.sign(record, ec.ECDSA(hashes.SHA256()))})


def read(content: bytes, authority: x509.Certificate, federation: str) -> Roster:
    """Raises T702, T705, T707 for what this authority did not sign for this federation."""
    parts = unpacked(content, "list of members", ("record", "signature"))
    key = authority.public_key()
    try:
        if not isinstance(key, ec.EllipticCurvePublicKey):
            raise ValueError
        key.verify(parts["signature"], parts["record"], ec.ECDSA(hashes.SHA256()))
        said = canonical.part(TAG, parts["record"], FORMS)
        members = {str(hash_): str(name) for hash_, name in json.loads(str(said["members"])).items()}
        recipes = frozenset(map(str, json.loads(str(said["recipes"]))))
        version, ends = int(said["version"]), int(said["ends"])
    except InvalidSignature:
        raise FedtuneError(
            "T707",
            sentence="the list of members is not signed by this federation's authority",
            do="it was ignored; ask the operator to run: fedtune keys publish",
        ) from None
    except (ValueError, TypeError, AttributeError, Refused):
        raise FedtuneError(
            "T702",
            "a list of members that cannot be read",
            "the list as it was signed",
            "ask the operator to run: fedtune keys publish",
        ) from None
    if said["federation"] != federation:
        raise FedtuneError(
            "T705",
            f"a list of members of {said['federation']!r}",
            f"one of '{federation}'",
            "it was ignored; ask the coordinator's operator",
        )
    return Roster(federation, version, ends, members, content, recipes)


def version_of(path: Path) -> int:
    """Of a file of one's own; 0 where there is none."""
    try:
        return version_then(path, path.stat().st_mtime_ns)
    except OSError:
        return 0


@functools.lru_cache(16)
def version_then(path: Path, stamp: int) -> int:
    try:
        return int(
            canonical.part(TAG, unpacked(path.read_bytes(), "list", ("record",))["record"], FORMS)["version"]
        )
    except FedtuneError:
        return 0


def pinned(places: Sequence[Path], authority: x509.Certificate, federation: str) -> Roster | None:
    """The newest list in these folders; None where there is none yet. Raises T702, T705, T707 for one that
    was tampered with."""
    found = [
        read((place / FILE).read_bytes(), authority, federation)
        for place in places
        if (place / FILE).exists()
    ]
    return max(found, key=lambda roster: roster.version, default=None)


def pin(home: Path, content: bytes, authority: x509.Certificate, federation: str, known: int) -> int:
    """Keep a list that is newer than the known one; the version that is known from here on. Raises T702,
    T705, T707."""
    roster = read(content, authority, federation)
    if roster.version > known:
        private.write(home / FILE, content, 0o644)
    return max(known, roster.version)

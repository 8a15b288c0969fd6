"""The private authority of a federation: makes, renews and revokes the keys of its members.

keys/                      0700; on the operator's machine
  authority/               key.pem (0600), certificate.pem: needed for fedtune keys only, never by a
  coordinator that runs
  coordinator/             what the coordinator runs with, and allowed.json
  clients/NAME/            what is carried to the site NAME
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from fedtune.disk import disk_errors, sync_folder
from fedtune.errors import FedtuneError
from fedtune.trust import private, requests, roster
from fedtune.trust.allowed import Entry, entry_of, read_entries, write_entries
from fedtune.trust.certificates import (
    federation_of,
    make_authority,
    make_member,
    peer_of,
    read_certificate,
    utc_now,
)
from fedtune.trust.identity import (
    ALLOWED,
    AUTHORITY,
    CERTIFICATE,
    KEY,
    SIGNING_KEY,
    Passphrase,
    from_environment,
    read_key,
    to_pem,
)
from fedtune.trust.names import COORDINATOR, Name, checked

try:
    import fcntl
except ImportError:
    fcntl = None  # type: ignore[assignment]


@dataclass(frozen=True)
class Authority:
    """The folder, with the key to sign with. `passphrase` of a method is the new member's own; the
    authority's opened it."""

    folder: Path
    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @property
    def federation(self) -> str:
        return federation_of(self.certificate)

    @property
    def allowed(self) -> Path:
        return self.folder / COORDINATOR / ALLOWED

    def issue(self, name: str, days: int, passphrase: str | None = None, now: datetime | None = None) -> Path:
        """A new client's folder. Raises T708 where the name is taken or not in its form."""
        checked(name, "name")
        now = now or utc_now()
        with locked(self.folder):
            if name == COORDINATOR or any(
                e.name == name and e.state(now) == "valid" for e in read_entries(self.allowed)
            ):
                raise FedtuneError(
                    "T708",
                    f"name '{name}', which already has keys",
                    "a new name",
                    f"run: fedtune keys renew {name}, or choose another name",
                )
            return self._make(name, (), days, passphrase, now)

    def renew(
        self,
        name: str,
        days: int,
        passphrase: str | None = None,
        hosts: Sequence[str] = (),
        now: datetime | None = None,
    ) -> Path:
        """New keys for a member; the old ones stay valid until they end or are revoked. Raises T708."""
        with locked(self.folder):
            known(read_entries(self.allowed), name)
            if name == COORDINATOR and not hosts:
                hosts = hosts_of(
                    read_certificate(
                        private.read_public(self.place(name) / CERTIFICATE),
                        f"'{self.place(name) / CERTIFICATE}'",
                    )
                )
            return self._make(name, hosts, days, passphrase, now or utc_now())

    def sign(self, request: bytes, days: int, now: datetime | None = None) -> tuple[str, bytes]:
        """A certificate for keys that were made elsewhere and stay there: the name, and what goes back to it.
        Raises T702, T707, T708."""
        asked = requests.read(request)
        if asked.federation != self.federation:
            raise FedtuneError(
                "T708",
                f"a request for federation {asked.federation[:80]!r}",
                f"one for '{self.federation}'",
                "send it to the right operator",
            )
        checked(asked.name, "name")
        if asked.name == COORDINATOR:
            raise FedtuneError(
                "T708",
                f"a request for the name '{COORDINATOR}'",
                "the name of a client",
                "make the coordinator's keys with: fedtune keys init",
            )
        with locked(self.folder):
            member = Name(self.federation, asked.name)
            certificate = make_member(
                member, asked.key, asked.signing_key, self.certificate, self.key, now or utc_now(), days
            )
            entries = read_entries(self.allowed)
            if any(entry.key == peer_of(certificate).key for entry in entries):
                raise FedtuneError(
                    "T708",
                    f"a key of '{asked.name}' that was signed before",
                    "a new key",
                    "run fedtune keys request again, at the site",
                )
            write_entries(self.allowed, [*entries, entry_of(peer_of(certificate))])
            self.publish(days, now)
        members = (self.folder / COORDINATOR / roster.FILE).read_bytes()
        return asked.name, requests.answer(pem(certificate), pem(self.certificate), members)

    def publish(self, days: int, now: datetime | None = None, recipes: Sequence[str] | None = None) -> int:
        """Sign the list of members as it is now; its version. Sites take it from the coordinator, and keep
        the newest. `recipes`: the only ones that may be run, () for all; None leaves them. Raises R404,
        T702."""
        path = self.folder / COORDINATOR / roster.FILE
        version = roster.version_of(path) + 1
        if recipes is None and path.exists():
            known = roster.read(path.read_bytes(), self.certificate, self.federation)
            recipes = sorted(known.recipes)
        private.write(
            path,
            roster.write(
                self.federation,
                version,
                read_entries(self.allowed),
                self.key,
                now or utc_now(),
                days,
                recipes or (),
            ),
            0o644,
        )
        return version

    def place(self, name: str) -> Path:
        return self.folder / COORDINATOR if name == COORDINATOR else self.folder / "clients" / name

    def _make(
        self, name: str, hosts: Sequence[str], days: int, passphrase: str | None, now: datetime
    ) -> Path:
        """Keys, certificate and the entry of the allow list. The entry first: a crash then leaves a key on
        the list that nobody holds."""
        key, signer = ec.generate_private_key(ec.SECP256R1()), ed25519.Ed25519PrivateKey.generate()
        member = Name(self.federation, name)
        certificate = make_member(
            member, key.public_key(), signer.public_key(), self.certificate, self.key, now, days, hosts
        )
        if self.allowed.exists():
            write_entries(self.allowed, [*read_entries(self.allowed), entry_of(peer_of(certificate))])
        files = {KEY: to_pem(key, passphrase), SIGNING_KEY: to_pem(signer, passphrase)}
        place = self.place(name)
        fresh, old = place.with_name(f".{name}.part"), place.with_name(f".{name}.old")
        with disk_errors(place):
            for leftover in (fresh, old):
                shutil.rmtree(leftover, ignore_errors=True)
            private.make_folder(place.parent)
            private.make_folder(fresh)
            for file, content in files.items():
                private.write(fresh / file, content)
            private.write(fresh / CERTIFICATE, pem(certificate), 0o644)
            private.write(fresh / AUTHORITY, pem(self.certificate), 0o644)
            if name == COORDINATOR:  # the list moves with the folder
                entries = (
                    read_entries(self.allowed) if self.allowed.exists() else [entry_of(peer_of(certificate))]
                )
                write_entries(fresh / ALLOWED, entries)
                if (place / roster.FILE).exists():
                    private.write(fresh / roster.FILE, (place / roster.FILE).read_bytes(), 0o644)
            if place.exists():
                place.rename(old)
            fresh.rename(place)
            sync_folder(place.parent)
            shutil.rmtree(old, ignore_errors=True)
        self.publish(days, now)
        if name != COORDINATOR:
            private.write(place / roster.FILE, (self.folder / COORDINATOR / roster.FILE).read_bytes(), 0o644)
        return place


def create(
    folder: Path,
    federation: str,
    hosts: Sequence[str],
    days: int,
    authority_passphrase: str | None = None,
    passphrase: str | None = None,
    now: datetime | None = None,
) -> Authority:
    """A new authority and the coordinator's keys. Raises T708 where there is one, or a name or host is not in
    its form."""
    checked(federation, "federation")
    if (folder / "authority").exists():
        raise FedtuneError(
            "T708",
            f"an authority in '{folder}'",
            "a folder without one",
            "choose another --keys folder, or go on with this one",
        )
    if not hosts:
        raise FedtuneError(
            "T708",
            "no host",
            "the names or addresses by which clients will call the coordinator",
            "give --host",
        )
    now = now or utc_now()
    private.make_folder(folder)
    with locked(folder):
        key = ec.generate_private_key(ec.SECP256R1())
        authority = Authority(folder, make_authority(federation, key, now), key)
        authority._make(
            COORDINATOR, hosts, days, passphrase, now
        )  # first: an authority's folder says that all is there
        fresh = folder / ".authority.part"
        with disk_errors(fresh):
            shutil.rmtree(fresh, ignore_errors=True)
            private.make_folder(fresh)
            private.write(fresh / KEY, to_pem(key, authority_passphrase))
            private.write(fresh / CERTIFICATE, pem(authority.certificate), 0o644)
            fresh.rename(folder / "authority")
            sync_folder(folder)
    return authority


def open_authority(folder: Path, passphrase: Passphrase = from_environment) -> Authority:
    """Raises T701, T702, T703."""
    private.require_private(folder)
    place = folder / "authority"
    private.require_private(place)
    key = read_key(place / KEY, passphrase)
    certificate = read_certificate(private.read_public(place / CERTIFICATE), f"'{place / CERTIFICATE}'")
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
        raise FedtuneError(
            "T702",
            f"a key '{place / KEY}' that does not belong to its certificate",
            "the two files that fedtune keys init made",
            "restore it from a backup",
        )
    return Authority(folder, certificate, key)


def revoke(coordinator: Path, name: str, key: str = "", now: datetime | None = None) -> list[Entry]:
    """Take a member's keys, or the one whose hash begins with `key`, off the list; needs no authority, so
    that a stolen key can be stopped at the coordinator.

    coordinator: the coordinator's folder. Returns what was revoked by this call. Raises T708 where there is
    nothing to revoke.
    """
    with locked(coordinator.parent):
        entries = read_entries(coordinator / ALLOWED)
        known(entries, name)
        meant = [e for e in entries if e.name == name and e.key.startswith(key) and not e.revoked]
        if not meant:
            raise FedtuneError(
                "T708",
                f"no key of '{name}'{f' that begins with {key}' if key else ''} that is not revoked yet",
                "one",
                "see: fedtune keys list",
            )
        if key and len(meant) > 1:
            raise FedtuneError(
                "T708",
                f"{len(meant)} keys of '{name}' that begin with {key}",
                "one",
                "give more digits, see: fedtune keys list",
            )
        revoked = [replace(e, revoked=(now or utc_now()).isoformat()) for e in meant]
        write_entries(coordinator / ALLOWED, [*(e for e in entries if e not in meant), *revoked])
    return revoked


def known(entries: Sequence[Entry], name: str) -> None:
    if not any(entry.name == name for entry in entries):
        names = ", ".join(sorted({entry.name for entry in entries}))[:200]
        raise FedtuneError(
            "T708", f"name {name[:80]!r}", f"one of {names}", f"run: fedtune keys issue {name[:80]}"
        )


def hosts_of(certificate: x509.Certificate) -> list[str]:
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return [
        *names.get_values_for_type(x509.DNSName),
        *(str(address) for address in names.get_values_for_type(x509.IPAddress)),
    ]


def pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One command at a time changes a folder of keys; what a crash left between two renames is put back
    first. Raises T702."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise private.missing(folder, error) from None
    try:
        if fcntl:  # without it (Windows) writes are still whole, but of two at once one may be lost
            fcntl.flock(handle, fcntl.LOCK_EX)
        for old in (*folder.glob(".*.old"), *folder.glob("clients/.*.old")):
            if not (place := old.with_name(old.name[1:-4])).exists():
                old.rename(place)
        yield
    finally:
        os.close(handle)

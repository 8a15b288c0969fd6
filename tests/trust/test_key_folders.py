"""A folder of keys: what is in it, who may read it, and what commands find that were cut."""

from __future__ import annotations

import os
import stat
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from fedtune.errors import FedtuneError
from fedtune.trust import load, requests
from fedtune.trust.allowed import Entry, read_entries
from fedtune.trust.authority import Authority, create, open_authority, revoke
from fedtune.trust.certificates import utc_now
from tests.refusals import code_of


@pytest.mark.skipif(os.name != "posix", reason="modes are a POSIX matter")
def test_only_keys_are_private_and_all_else_can_be_read(authority: Authority, tmp_path: Path) -> None:
    """A coordinator may run as another user than the one who copies its folder; whatever was renewed since."""
    before = os.umask(0)
    try:
        site = authority.issue("a", 30)
        authority.renew("coordinator", 30)
        revoke(authority.place("coordinator"), "a")
        place = tmp_path / "site" / "b"
        path, _ = requests.make(place, "hospitals", "b")
        requests.accept(place, authority.sign(path.read_bytes(), 30)[1])
    finally:
        os.umask(before)
    files = [path for root in (authority.folder, tmp_path / "site") for path in root.rglob("*")]
    for path in files:
        wanted = 0o700 if path.is_dir() else 0o600 if path.name.endswith("key.pem") else 0o644
        assert path.name == "clients" or stat.S_IMODE(path.stat().st_mode) == wanted, path
    assert {path.name for path in site.iterdir()} == {path.name for path in place.iterdir()}
    assert {path.name for path in authority.place("coordinator").iterdir()} == {
        *(path.name for path in site.iterdir()),
        "allowed.json",
    }


def test_what_a_crash_left_half_made_is_not_in_the_way(authority: Authority, tmp_path: Path) -> None:
    authority.issue("a", 30)
    for place in (authority.place("a"), authority.place("coordinator")):
        for word in ("part", "old"):
            (place.parent / f".{place.name}.{word}").mkdir()
            (place.parent / f".{place.name}.{word}" / "key.pem").write_bytes(b"half")
        new = authority.renew(place.name, 30)
        assert load(new).name.name == place.name and not list(place.parent.glob(".*"))
    fresh = tmp_path / "fresh"
    (fresh / ".authority.part").mkdir(parents=True)
    (fresh / ".authority.part" / "half").write_bytes(b"")
    fresh.chmod(0o700)
    create(fresh, "f", ["localhost"], 1)
    assert sorted(path.name for path in (fresh / "authority").iterdir()) == ["certificate.pem", "key.pem"]


def test_an_authority_is_its_own_key_and_certificate_in_private_folders(
    authority: Authority, tmp_path: Path
) -> None:
    other = create(tmp_path / "other", "hospitals", ["localhost"], 30)
    place = authority.folder / "authority"
    key = (place / "key.pem").read_bytes()
    signer = (authority.place("coordinator") / "signing-key.pem").read_bytes()
    for content in ((other.folder / "authority" / "key.pem").read_bytes(), signer, b"none"):
        (place / "key.pem").write_bytes(content)
        assert code_of(open_authority, authority.folder) == "T702"
    (place / "key.pem").write_bytes(key)
    opened = open_authority(authority.folder)
    assert (opened.federation, opened.folder) == ("hospitals", authority.folder)
    assert load(opened.issue("a", 30)).name.name == "a"
    for folder in (authority.folder, place):
        folder.chmod(0o750)
        assert code_of(open_authority, authority.folder) == "T701"
        folder.chmod(0o700)


def test_an_entry_says_what_its_key_may() -> None:
    now = utc_now()
    entry = Entry("a", "k", (now - timedelta(1)).isoformat(), now.isoformat())
    assert [entry.state(now), entry.state(now + timedelta(seconds=1))] == ["valid", "expired"]
    assert replace(entry, revoked="then").state(now) == "revoked"


def test_the_allow_list_is_in_order_and_for_people(authority: Authority) -> None:
    for name in ("b", "a"):
        authority.issue(name, 30)
    again = load(authority.renew("a", 60, now=utc_now() - timedelta(days=5)))
    entries = read_entries(authority.allowed)
    assert [entry.name for entry in entries] == ["a", "a", "b", "coordinator"]
    assert entries[0] == Entry(
        "a", again.peer.key, again.peer.starts.isoformat(), again.peer.ends.isoformat()
    )
    assert len(authority.allowed.read_text().splitlines()) > 4 * 7  # a line a word


def test_sentences_name_what_they_are_about(authority: Authority, tmp_path: Path) -> None:
    folder = authority.issue("a", 30)
    with pytest.raises(FedtuneError, match="T708: found federation 'B A D'"):
        create(tmp_path / "x", "B A D", ["localhost"], 1)
    with pytest.raises(FedtuneError, match="T708: found name 'B A D'"):
        authority.issue("B A D", 1)
    with pytest.raises(FedtuneError, match="T708: found federation 'B A D'"):
        requests.make(tmp_path / "y", "B A D", "a")
    with pytest.raises(FedtuneError, match="T708: found name 'B A D'"):
        requests.make(tmp_path / "y", "f", "B A D")
    peer = load(folder).peer
    for at in (peer.starts - timedelta(hours=1), peer.ends + timedelta(hours=1)):
        with pytest.raises(FedtuneError) as caught:
            load(folder, now=at)
        named = peer.starts if at < peer.starts else peer.ends
        assert all(f"{time:%Y-%m-%d %H:%M} UTC" in str(caught.value) for time in (named, at))
    for name in ("certificate.pem", "authority.pem", "key.pem", "signing-key.pem"):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(b"none")
        with pytest.raises(FedtuneError, match=rf"T702.*{folder / name}"):
            load(folder)
        (folder / name).write_bytes(content)

"""The authority's signed list of members: what is on it, for how long, and which of two lists counts."""

from __future__ import annotations

import stat
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from fedtune.errors import FedtuneError
from fedtune.trust import AllowList, canonical, load
from fedtune.trust.authority import Authority, create, revoke
from fedtune.trust.certificates import utc_now
from fedtune.trust.identity import peer_from_tls
from fedtune.trust.requests import packed
from fedtune.trust.roster import FILE, TAG, Roster, pin, pinned, read, version_of


def test_an_older_or_a_forged_list_is_not_taken(tmp_path: Path) -> None:
    made = create(tmp_path / "keys", "hospitals", ["localhost"], 30)
    site = load(made.issue("site-a", 30))
    path, home = made.place("coordinator") / FILE, tmp_path / "home"
    home.mkdir()
    older = path.read_bytes()
    made.issue("site-b", 30)
    newer = path.read_bytes()
    version = version_of(path)
    assert (
        pin(home, newer, site.authority, "hospitals", 0)
        == version
        == read(older, site.authority, "hospitals").version + 1
    )
    assert (
        pin(home, older, site.authority, "hospitals", version) == version
        and (home / FILE).read_bytes() == newer
    )
    known = pinned([site.folder, home], site.authority, "hospitals")
    assert (
        known
        and known.version == version
        and set(known.members.values()) == {"coordinator", "site-a", "site-b"}
    )
    other = create(tmp_path / "other", "hospitals", ["localhost"], 30)
    for forged in (
        (other.place("coordinator") / FILE).read_bytes(),
        newer.replace(b"A", b"B", 3),
        b"",
        b"{}",
    ):
        with pytest.raises(FedtuneError, match=r"T70[27]"):
            pin(home, forged, site.authority, "hospitals", version)
    with pytest.raises(FedtuneError, match="T705"):
        read(newer, site.authority, "banks")
    with pytest.raises(FedtuneError, match="T704"):
        known.check(site.peer, utc_now() + timedelta(days=31))
    with pytest.raises(FedtuneError, match="T706"):
        known.check(load(other.place("coordinator")).peer, utc_now())


def test_a_list_names_every_valid_key_until_its_end(authority: Authority) -> None:
    site, gone = load(authority.issue("site-a", 30)), load(authority.issue("gone", 30))
    revoke(authority.place("coordinator"), "gone", gone.peer.key[:16])
    version = authority.publish(10)
    list_ = read((authority.place("coordinator") / FILE).read_bytes(), site.authority, "hospitals")
    coordinator = load(authority.place("coordinator"))
    assert list_.members == {site.peer.key: "site-a", coordinator.peer.key: "coordinator"}
    assert (list_.federation, list_.version) == ("hospitals", version)
    now = utc_now()
    assert (
        timedelta(days=10, seconds=-60)
        < timedelta(seconds=list_.ends - now.timestamp())
        <= timedelta(days=10)
    )
    list_.check(site.peer, now)
    list_.check(coordinator.peer, now + timedelta(days=9))
    for peer, late, code in (
        (site.peer, timedelta(days=10, seconds=1), "T704"),
        (gone.peer, timedelta(), "T706"),
    ):
        with pytest.raises(FedtuneError, match=code):
            list_.check(peer, now + late)


def test_a_key_speaks_under_its_own_name_only(authority: Authority) -> None:
    site, other = load(authority.issue("site-a", 30)), load(authority.issue("site-b", 30))
    list_ = read((authority.place("coordinator") / FILE).read_bytes(), site.authority, "hospitals")
    swapped = Roster("hospitals", 9, list_.ends, {site.peer.key: "site-b"}, b"")
    for peer in (site.peer, other.peer):
        with pytest.raises(FedtuneError, match="T706"):
            swapped.check(peer, utc_now())


def test_what_this_authority_did_not_sign_is_refused_and_never_kept(
    authority: Authority, tmp_path: Path
) -> None:
    site = load(authority.issue("site-a", 30))
    good = (authority.place("coordinator") / FILE).read_bytes()
    assert read(good, site.authority, "hospitals").content == good
    for damaged in (good[:-3], good[1:], good + b"x", good.replace(b"record", b"recorf")):
        with pytest.raises(FedtuneError, match=r"T70[27]"):
            pin(tmp_path, damaged, site.authority, "hospitals", 0)
        assert not (tmp_path / FILE).exists()


def test_sites_keep_the_newest_list_and_look_in_all_their_folders(
    authority: Authority, tmp_path: Path
) -> None:
    site, path = load(authority.issue("site-a", 30)), authority.place("coordinator") / FILE
    keys, home = tmp_path / "site-keys", tmp_path / "home"
    keys.mkdir()
    home.mkdir()
    assert pinned([keys, home], site.authority, "hospitals") is None
    older, first = path.read_bytes(), version_of(path)
    newer_version = authority.publish(30)
    newer = path.read_bytes()
    assert newer_version == first + 1 == version_of(path) and version_of(home / FILE) == 0
    assert pin(home, newer, site.authority, "hospitals", 0) == newer_version
    assert stat.S_IMODE((home / FILE).stat().st_mode) == 0o644
    assert pin(home, newer, site.authority, "hospitals", newer_version) == newer_version
    (home / FILE).unlink()
    assert pin(home, newer, site.authority, "hospitals", newer_version) == newer_version
    assert not (home / FILE).exists()  # what is known already is not written
    for places in ([keys, home], [home, keys]):
        (keys / FILE).write_bytes(older)
        (home / FILE).write_bytes(newer)
        found = pinned(places, site.authority, "hospitals")
        assert found and found.version == newer_version
    (home / FILE).write_bytes(b"{}")
    assert version_of(home / FILE) == 0
    with pytest.raises(FedtuneError, match="T702"):
        pinned([keys, home], site.authority, "hospitals")


def test_a_member_speaks_while_any_of_its_keys_does(authority: Authority) -> None:
    allowed = AllowList(authority.allowed)
    assert not allowed.speaks("site-a")
    first = load(authority.issue("site-a", 30))
    authority.issue("site-b", 30)
    second = load(authority.renew("site-a", 60))
    assert allowed.speaks("site-a") and allowed.speaks("site-a", utc_now() + timedelta(days=45))
    assert not allowed.speaks("site-b", utc_now() + timedelta(days=45))
    assert not allowed.speaks("site-a", utc_now() + timedelta(days=61))
    place = authority.place("coordinator")
    revoke(place, "site-a", second.peer.key[:16])
    assert allowed.speaks("site-a")
    revoke(place, "site-a", first.peer.key[:16])
    assert not allowed.speaks("site-a") and allowed.speaks("site-b") and not allowed.speaks("site")


def test_who_is_at_the_other_end_of_tls_is_of_this_federation(authority: Authority, tmp_path: Path) -> None:
    site = load(authority.issue("site-a", 30))
    assert peer_from_tls(site.certificate, "hospitals") == site.peer
    banks = load(create(tmp_path / "banks", "banks", ["localhost"], 30).issue("site-a", 30))
    with pytest.raises(FedtuneError, match=r"T705.*federation 'banks'"):
        peer_from_tls(banks.certificate, "hospitals")


def test_only_recipes_that_the_list_names_may_be_run(authority: Authority) -> None:
    """None named: every one; and what was named stays so until something else is said."""
    path, fingerprints = authority.place("coordinator") / FILE, ["a" * 64, "b" * 64]

    def listed() -> Roster:
        return read(path.read_bytes(), authority.certificate, "hospitals")

    listed().check_recipe("c" * 64)
    authority.publish(30, recipes=fingerprints)
    authority.issue("site-a", 30)
    authority.publish(30)
    assert listed().recipes == frozenset(fingerprints)
    for one in fingerprints:
        listed().check_recipe(one)
    with pytest.raises(FedtuneError, match=r"F507.*cccc"):
        listed().check_recipe("c" * 64)
    authority.publish(30, recipes=())
    listed().check_recipe("c" * 64)


@pytest.mark.parametrize(
    ("members", "recipes"), [("none", "[]"), ("[]", "[]"), ("{}", "none"), ("{}", "1")], ids=repr
)
def test_what_the_authority_signed_and_is_no_list_cannot_be_read(
    authority: Authority, members: str, recipes: str
) -> None:
    said: list[tuple[canonical.Form, canonical.Value]] = [
        ("text", "hospitals"),
        ("number", 1),
        ("number", 2),
        ("text", members),
        ("text", recipes),
    ]
    for record in (canonical.join(TAG, said), b"none"):
        signature = authority.key.sign(record, ec.ECDSA(hashes.SHA256()))
        with pytest.raises(FedtuneError, match="T702"):
            read(packed({"record": record, "signature": signature}), authority.certificate, "hospitals")

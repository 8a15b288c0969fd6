"""Keys that renew themselves, at the site: when it asks for new ones, and which ones it goes on with."""

from __future__ import annotations

import shutil
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from fedtune.errors import FedtuneError
from fedtune.trust import load, renewal, requests, roster
from fedtune.trust.authority import create, pem
from fedtune.trust.certificates import make_member
from fedtune.trust.requests import packed, unpacked
from fedtune.trust.signed import Signed
from tests.trust.renewing import DAYS, Scene, mode


def test_new_keys_are_asked_for_in_the_last_third_of_a_life(scene: Scene) -> None:
    peer = scene.site.peer
    life = peer.ends - peer.starts
    assert renewal.left(peer, peer.starts) == 1 and renewal.left(peer, peer.ends) == 0
    assert renewal.left(peer, peer.starts + life / 4) == 0.75
    for before, asks in ((life / 3 + timedelta(seconds=1), False), (life / 3, True), (timedelta(0), True)):
        at = peer.ends - before
        assert renewal.ends_soon(scene.keys, at) == asks
        assert bool(renewal.asked(scene.site, scene.home, at)) == asks
        assert (scene.home / "keys").exists() == asks
    assert renewal.ends_soon(scene.keys) and not renewal.ends_soon(scene.authority.place("coordinator"))


def test_a_request_is_the_same_until_it_is_answered(scene: Scene) -> None:
    """One key of the site's, whatever happens to it on the way: a second request would be a second key."""
    place = scene.home / "keys" / "next"
    wanted = renewal.asked(scene.site, scene.home)
    keys = {path.name: path.read_bytes() for path in place.iterdir()}
    assert renewal.asked(scene.site, scene.home) == wanted
    assert keys == {path.name: path.read_bytes() for path in place.iterdir()}
    assert mode(scene.home / "keys") == 0o700 == mode(place) and b"ENCRYPTED" not in keys["key.pem"]
    signed = Signed.from_json(wanted)
    assert signed.certificate == scene.site.certificate
    assert signed.record == (scene.home / "keys" / "site-d.request").read_bytes()
    asked = requests.read(signed.record)
    assert (asked.federation, asked.name) == ("hospitals", "site-d")


@pytest.mark.parametrize("lost", ["next/key.pem", "next/signing-key.pem", "site-d.request"])
def test_what_a_crash_left_of_a_request_is_made_anew(scene: Scene, lost: str) -> None:
    first = renewal.asked(scene.site, scene.home)
    (scene.home / "keys" / lost).unlink()
    second = renewal.asked(scene.site, scene.home)
    if lost == "next/signing-key.pem":  # noticed when the answer comes
        assert second == first
        return
    assert second != first
    new = scene.authority.sign(Signed.from_json(second).record, 30)[1]
    assert renewal.accept(new, scene.site, scene.home).name == scene.site.name


@pytest.mark.parametrize("passphrase", ["", "boat"])
def test_new_keys_are_encrypted_where_the_present_ones_are(
    scene: Scene, passphrase: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDTUNE_PASSPHRASE", "boat")
    keys = scene.authority.renew("site-d", 30, passphrase or None, now=scene.now - 25 * DAYS)
    site = load(keys)
    wanted = renewal.asked(site, scene.home)
    files = [scene.home / "keys" / "next" / name for name in ("key.pem", "signing-key.pem")]
    assert [b"ENCRYPTED" in path.read_bytes() for path in files] == [bool(passphrase)] * 2
    answer = scene.authority.sign(Signed.from_json(wanted).record, 42)[1]
    monkeypatch.delenv("FEDTUNE_PASSPHRASE")

    def given(path: Path) -> str:
        return "boat"

    assert renewal.accept(answer, site, scene.home, given).name == site.name
    if not passphrase:
        assert renewal.newest(keys, scene.home).peer != site.peer
        return
    assert renewal.newest(keys, scene.home, given).peer != site.peer
    assert renewal.newest(keys, scene.root, given).peer == site.peer  # where nothing was renewed
    with pytest.raises(FedtuneError, match="T703"):
        renewal.newest(keys, scene.home)


def test_renewed_keys_take_the_place_of_the_request(scene: Scene) -> None:
    new = scene.renewed()
    assert new.peer.key != scene.site.peer.key and new.name == scene.site.name
    assert new.folder == scene.home / "keys" / new.peer.key[:16]
    assert [path.name for path in (scene.home / "keys").iterdir()] == [new.folder.name]
    assert sorted(path.name for path in new.folder.iterdir()) == [
        "authority.pem",
        "certificate.pem",
        "key.pem",
        "members.signed",
        "signing-key.pem",
    ]
    assert renewal.newest(scene.keys, scene.home).peer == new.peer
    assert renewal.asked(new, scene.home) == b""  # and rests until a third is left


def test_an_answer_that_is_not_this_sites_changes_nothing(scene: Scene) -> None:
    record = Signed.from_json(renewal.asked(scene.site, scene.home)).record
    stranger = create(scene.root / "else", "hospitals", ["localhost"], 30)
    foreign = stranger.sign(record, 42)[1]
    others = scene.authority.sign(Signed.from_json(scene.request("site-d")).record, 42)[1]
    another = scene.authority.sign(Signed.from_json(scene.request("site-x")).record, 42)[1]
    good = scene.authority.sign(record, 42)[1]

    def with_part(name: str, content: bytes) -> bytes:
        return packed(unpacked(good, "", ("certificate", "authority", "members")) | {name: content})

    part = {name: unpacked(foreign, "", (name,))[name] for name in ("authority", "members")}
    made, asked = scene.authority, requests.read(record)
    of_banks = roster.write("banks", 9, [], made.key, scene.now, 30)
    ended = make_member(
        scene.site.name, asked.key, asked.signing_key, made.certificate, made.key, scene.now - 30 * DAYS, 29
    )
    before = {path: path.read_bytes() for path in scene.home.rglob("*") if path.is_file()}
    for answer, code in (
        (foreign, "T705"),
        (others, "T702"),
        (another, "T705"),
        (with_part("authority", part["authority"]), "T705"),
        (with_part("certificate", b"none"), "T702"),
        (with_part("members", part["members"]), "T707"),
        (with_part("members", of_banks), "T705"),
        (with_part("certificate", pem(ended)), "T704"),
        (b"{}", "T702"),
        (b"", "T702"),
    ):
        with pytest.raises(FedtuneError, match=f"^{code}"):
            renewal.accept(answer, scene.site, scene.home)
        assert before == {path: path.read_bytes() for path in scene.home.rglob("*") if path.is_file()}
    assert renewal.newest(scene.keys, scene.home).peer == scene.site.peer
    assert renewal.accept(good, scene.site, scene.home).name == scene.site.name


def test_a_site_goes_on_with_the_newest_keys_that_can_be_used(scene: Scene) -> None:
    """Kept under home: newer, older, ended, damaged and unfinished ones, and another name's."""
    kept = scene.home / "keys"
    assert renewal.newest(scene.keys, scene.home).folder == scene.keys
    kept.mkdir(mode=0o700)

    def keep(place: str, name: str, started: datetime, days: int = 30) -> Path:
        made = scene.authority.renew(name, days, now=started)
        return Path(shutil.copytree(made, kept / place))

    given = Path(shutil.copytree(scene.keys, scene.root / "given"))
    scene.authority.issue("site-x", 30)
    keep("b-older", "site-d", scene.now - 26 * DAYS)
    keep("c-ended", "site-d", scene.now - 20 * DAYS, 19)
    keep("d-other", "site-x", scene.now)
    keep("next", "site-d", scene.now)
    (kept / "a-empty").mkdir(mode=0o700)
    (keep("e-damaged", "site-d", scene.now) / "key.pem").write_bytes(b"none")
    assert renewal.newest(given, scene.home).folder == given
    newest, middle = keep("f", "site-d", scene.now - 2 * DAYS), keep("g", "site-d", scene.now - 10 * DAYS)
    assert renewal.newest(given, scene.home).folder == newest
    shutil.rmtree(newest)
    assert renewal.newest(given, scene.home).folder == middle
    later = scene.authority.renew("site-d", 5, now=scene.now - 5 * DAYS + timedelta(minutes=5))
    assert renewal.newest(later, scene.home).folder == later  # what the operator gives later comes first
    (given / "certificate.pem").unlink()
    with pytest.raises(FedtuneError, match=r"T702.*certificate\.pem"):
        renewal.newest(given, scene.home)

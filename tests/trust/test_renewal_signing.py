"""Keys that renew themselves, where they are signed: what the coordinator's desk and the authority make of a request."""

from __future__ import annotations

import os
from dataclasses import replace
from datetime import timedelta

import pytest

from fedtune.cli import main
from fedtune.errors import FedtuneError, Refused
from fedtune.trust import load, renewal
from fedtune.trust.allowed import read_entries, write_entries
from fedtune.trust.authority import create, revoke
from fedtune.trust.certificates import SKEW, peer_of, read_certificate, utc_now
from fedtune.trust.identity import following
from fedtune.trust.renewal import AGAIN, LONGEST
from fedtune.trust.requests import unpacked
from fedtune.trust.signed import Signed, seal
from tests.trust.renewing import DAYS, Scene, mode

# --- the coordinator ---


def test_the_desk_keeps_a_request_for_the_authority_and_hands_out_the_answer_to_it(scene: Scene) -> None:
    wanted, path = renewal.asked(scene.site, scene.home), scene.desk.folder / "site-d.request"
    assert scene.handed_in(wanted) == b"" and path.read_bytes() == wanted
    assert mode(path) == 0o644 and mode(scene.desk.folder) == 0o700
    written = path.stat().st_mtime_ns
    assert scene.handed_in(wanted) == b"" and path.stat().st_mtime_ns == written  # written once
    scene.signs()
    answer = (scene.desk.folder / "site-d.answer").read_bytes()
    assert scene.handed_in(wanted) == answer == scene.handed_in(wanted)


def test_a_member_hands_in_one_request_a_minute(scene: Scene) -> None:
    """Whoever holds its keys cannot fill the authority's folder, nor push out what was asked before."""
    first, second = scene.request("site-d"), scene.request("site-d")
    path = scene.desk.folder / "site-d.request"
    scene.handed_in(first)
    assert scene.handed_in(second) == b"" and path.read_bytes() == first
    for age, kept in ((AGAIN - 5, first), (AGAIN + 5, second)):
        at = utc_now().timestamp() - age
        os.utime(path, (at, at))
        assert scene.handed_in(second) == b"" and path.read_bytes() == kept
    assert [one.name for one in scene.desk.folder.iterdir()] == ["site-d.request"]


def test_an_answer_goes_to_the_keys_that_asked_only(scene: Scene) -> None:
    first, second = scene.request("site-d"), scene.request("site-d")
    scene.handed_in(first)
    scene.signs()
    path = scene.desk.folder / "site-d.request"
    os.utime(path, (0, 0))
    assert scene.handed_in(second) == b""  # of the other keys, there is one
    os.utime(path, (0, 0))
    assert scene.handed_in(first) == (scene.desk.folder / "site-d.answer").read_bytes()
    stranger = create(scene.root / "else", "hospitals", ["localhost"], 30)
    answer = stranger.sign(Signed.from_json(first).record, 42)[1]
    (scene.desk.folder / "site-d.answer").write_bytes(answer)
    with pytest.raises(FedtuneError, match="T705"):
        scene.handed_in(first)


def test_the_desk_takes_a_members_own_request_only(scene: Scene) -> None:
    """Not one for another name, not another's, none that is no request; and nothing of it is kept."""
    other = load(scene.authority.issue("site-a", 30))
    outside = load(create(scene.root / "else", "hospitals", ["localhost"], 30).issue("site-d", 30))
    with pytest.raises(FedtuneError, match="T705"):
        scene.desk.hand_in(other.peer, renewal.asked(scene.site, scene.home), scene.coordinator)
    good = Signed.from_json(scene.request("site-d"))
    for content, code in (
        (scene.request("site-a"), "T705"),
        (scene.request("coordinator"), "T705"),
        (scene.request("site-d", federation="banks"), "T705"),
        (scene.request("site-d", by=outside), "T705"),
        (scene.request("site-d", by=other), "T705"),
        (replace(good, record=good.record + b" ").to_json(), "T707"),
        (seal(b"none", scene.site).to_json(), "T702"),
        (b"x" * LONGEST, "W601"),
        (b"x" * (LONGEST + 1), "W606"),
    ):
        with pytest.raises((FedtuneError, Refused), match=f"^{code}"):
            scene.handed_in(content)
    assert not scene.desk.folder.exists()


# --- the authority ---


def test_the_authority_signs_what_waits_and_says_why_not_of_the_rest(scene: Scene) -> None:
    made = scene.authority
    scene.handed_in(renewal.asked(scene.site, scene.home))
    young = load(made.issue("site-a", 30))
    (scene.desk.folder / "site-a.request").write_bytes(scene.request("site-a", by=young))
    (scene.desk.folder / "site-z.request").write_bytes(b"x" * (LONGEST + 1))
    (scene.desk.folder / "notes.txt").write_bytes(b"none")
    said = scene.signs(days=42)
    assert [line.partition(".request: ")[0] for line in said] == ["site-a", "site-d", "site-z"]
    assert said[0].partition("not signed. ")[2].startswith("T708") and "first half" in said[0]
    assert said[1] == "site-d.request: signed for 42 days"
    assert said[2].partition("not signed. ")[2].startswith("W606")
    answer = scene.desk.folder / "site-d.answer"
    assert mode(answer) == 0o644 and len(list(scene.desk.folder.glob("*.answer"))) == 1
    kept = answer.read_bytes()
    assert len(scene.signs()) == 2 and answer.read_bytes() == kept  # once
    new = renewal.accept(kept, scene.site, scene.home).peer
    entry = read_entries(made.allowed)[-1]
    assert (entry.name, entry.key) == ("site-d", new.key) and entry.state(scene.now) == "valid"


def test_renewed_keys_begin_now_and_last_as_long_as_was_said(scene: Scene) -> None:
    content, later = scene.request("site-d"), scene.now.replace(microsecond=0) + 2 * DAYS
    name, answer = renewal.signed_answer(scene.authority, content, 42, later)
    peer = peer_of(read_certificate(unpacked(answer, "", ("certificate",))["certificate"], ""))
    assert name == "site-d" == peer.name.name and (peer.starts, peer.ends) == (
        later - SKEW,
        later + 42 * DAYS,
    )
    (scene.root / "at").mkdir()
    (scene.root / "at" / "site-d.request").write_bytes(scene.request("site-d"))
    assert list(renewal.answered(scene.authority, scene.root / "at", 7, later)) == [
        "site-d.request: signed for 7 days"
    ]
    assert (later + 7 * DAYS).isoformat() in {entry.ends for entry in read_entries(scene.authority.allowed)}


def test_keys_in_the_first_half_of_their_life_vouch_for_none(scene: Scene) -> None:
    peer, content = scene.site.peer, scene.request("site-d")
    half = peer.ends - (peer.ends - peer.starts) / 2
    with pytest.raises(FedtuneError, match=r"T708.*first half"):
        renewal.signed_answer(scene.authority, content, 42, half - timedelta(seconds=1))
    assert renewal.signed_answer(scene.authority, content, 42, half)[1]


def test_a_name_has_three_valid_keys_at_most(scene: Scene) -> None:
    """Revoked and ended ones do not count, nor those of others."""
    made, now = scene.authority, scene.now
    made.issue("site-a", 30)
    gone = load(made.renew("site-d", 30))
    revoke(made.place("coordinator"), "site-d", gone.peer.key[:16])
    made.renew("site-d", 1, now=now - 10 * DAYS)
    asks = [scene.request("site-d") for _ in range(3)]
    for content in asks[:2]:
        assert renewal.signed_answer(made, content, 42, now)[1]
    with pytest.raises(FedtuneError, match=r"T708.*has 3 valid keys"):
        renewal.signed_answer(made, asks[2], 42, now)
    assert renewal.signed_answer(made, asks[0], 42, now) == ("site-d", b"")  # signed before: nothing to say


def test_keys_that_are_not_on_the_allow_list_vouch_for_none(scene: Scene) -> None:
    made, now, content = scene.authority, scene.now, scene.request("site-d")
    entries = read_entries(made.allowed)
    mine = next(entry for entry in entries if entry.key == scene.site.peer.key)
    others = [entry for entry in entries if entry != mine]
    for listed in (
        others,
        [*others, replace(mine, name="site-a")],
        [*others, replace(mine, revoked=now.isoformat())],
        [*others, replace(mine, ends=(now - DAYS).isoformat())],
    ):
        write_entries(made.allowed, listed)
        with pytest.raises(FedtuneError, match=r"^T706"):
            renewal.signed_answer(made, content, 42, now)
    write_entries(made.allowed, entries)
    with pytest.raises(FedtuneError, match=r"^T704"):
        renewal.signed_answer(made, content, 42, now + 6 * DAYS)
    for other in ("site-a", "coordinator"):
        with pytest.raises(FedtuneError, match=r"^T705"):
            renewal.signed_answer(made, scene.request(other), 42, now)
    assert read_entries(made.allowed) == entries
    assert renewal.signed_answer(made, content, 42, now)[0] == "site-d"


def test_a_coordinator_signs_with_renewed_keys_without_a_restart(scene: Scene) -> None:
    folder = scene.authority.place("coordinator")
    now = following(folder)
    before = now()
    assert now() is before
    scene.authority.renew("coordinator", 42, now=utc_now() - 40 * DAYS)
    second = now()
    assert renewal.ends_soon(folder) and second.peer == load(folder).peer != before.peer
    (folder / "certificate.pem").write_bytes(b"none")
    assert now() is second  # keys that cannot be read leave those of before
    (folder / "certificate.pem").unlink()
    assert now() is second
    scene.authority.renew("coordinator", 42, hosts=["localhost"])
    assert now().peer == load(folder).peer


def test_the_operators_timer_signs_what_waits_and_renews_the_coordinators_own_keys(
    scene: Scene, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = scene.authority.place("coordinator")
    command = [
        "keys",
        "renewals",
        "--keys",
        str(scene.authority.folder),
        "--at",
        str(scene.desk.folder),
        "--days",
    ]
    scene.handed_in(renewal.asked(scene.site, scene.home))
    assert main([*command, "42"]) == 0
    assert capsys.readouterr().out == "site-d.request: signed for 42 days\n"  # the coordinator's are young
    scene.authority.renew("coordinator", 42, now=scene.now - 40 * DAYS)
    assert main([*command, "50"]) == 0 and "the coordinator's keys were renewed" in capsys.readouterr().out
    assert not renewal.ends_soon(folder) and (load(folder).peer.ends - scene.now).days in (49, 50)

"""Keys on disk: who may read them, what belongs together, how they are renewed, and when they end."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest

from fedtune.errors import FedtuneError
from fedtune.trust import AllowList, Identity, Name, load, private
from fedtune.trust.allowed import read_entries
from fedtune.trust.authority import Authority, create, open_authority, revoke
from fedtune.trust.certificates import utc_now
from tests.refusals import code_of


def test_a_member_is_who_its_certificate_says(authority: Authority) -> None:
    site = load(authority.issue("site-a", 30))
    assert (
        site.name == Name("hospitals", "site-a")
        and site.name.uri == "spiffe://fedtune/hospitals/client/site-a"
    )
    assert load(authority.place("coordinator")).name.uri == "spiffe://fedtune/hospitals/coordinator"
    assert site.peer.ends - site.peer.starts == timedelta(days=30, hours=1)
    assert "PRIVATE" not in repr(site) and Name.from_uri(site.name.uri) == site.name
    for odd in (
        "spiffe://fedtune/hospitals/client/coordinator",
        "spiffe://fedtune/hospitals/site-a",
        "spiffe://other/hospitals/client/a",
        site.name.uri + "/",
    ):
        assert Name.from_uri(odd) is None


@pytest.mark.skipif(os.name != "posix", reason="modes are a POSIX matter")
@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o660, 0o601])
def test_a_key_that_others_can_read_is_refused_with_the_command_that_mends_it(
    authority: Authority, mode: int
) -> None:
    folder = authority.issue("site-a", 30)
    for name in ("key.pem", "signing-key.pem"):
        assert (folder / name).stat().st_mode & 0o777 == 0o600
        (folder / name).chmod(mode)
        with pytest.raises(
            FedtuneError,
            match=rf"T701: found mode {mode:04o} of .*{name}', expected 0600.*; run: chmod 600 .*{name}\.",
        ):
            load(folder)
        (folder / name).chmod(0o600)
    folder.chmod(0o750)
    with pytest.raises(FedtuneError, match=r"T701.*chmod 700"):
        load(folder)
    folder.chmod(0o700)
    assert load(folder).name.name == "site-a"


@pytest.mark.skipif(os.name != "posix", reason="modes are a POSIX matter")
def test_keys_are_private_from_their_first_byte_whatever_the_umask(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    fsync = os.fsync

    def look(handle: int) -> None:
        seen.append(os.fstat(handle).st_mode & 0o777)
        fsync(handle)

    monkeypatch.setattr(os, "fsync", look)
    before = os.umask(0)
    try:
        create(tmp_path / "keys", "f", ["localhost"], 1)
    finally:
        os.umask(before)
    assert seen.count(0o600) == 3 and all(
        (tmp_path / "keys" / name).stat().st_mode & 0o777 == 0o700
        for name in (".", "authority", "coordinator")
    )


def test_passphrases_come_from_the_environment_or_a_prompt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FEDTUNE_PASSPHRASE", raising=False)
    made = create(tmp_path / "keys", "f", ["localhost"], 1, authority_passphrase="anchor", passphrase="ship")
    folder = made.issue("a", 1, passphrase="boat")
    content = (folder / "key.pem").read_bytes()
    assert b"ENCRYPTED" in content and b"ENCRYPTED" in (folder / "signing-key.pem").read_bytes()
    assert code_of(load, folder) == "T703"
    assert code_of(load, folder, lambda path: "wrong") == "T703"
    monkeypatch.setenv("FEDTUNE_PASSPHRASE", "boat")
    assert load(folder).name.name == "a" and b"ENCRYPTED" not in load(folder).key
    assert code_of(load, made.place("coordinator")) == "T703"
    assert code_of(open_authority, made.folder) == "T703"  # the authority's has a variable of its own
    monkeypatch.setenv("FEDTUNE_AUTHORITY_PASSPHRASE", "anchor")
    assert open_authority(made.folder).federation == "f"


def test_what_does_not_belong_together_is_refused(authority: Authority, tmp_path: Path) -> None:
    a, b = authority.issue("a", 30), authority.issue("b", 30)
    for name in ("key.pem", "signing-key.pem", "certificate.pem"):
        mixed = Path(shutil.copytree(a, tmp_path / "mixed"))
        shutil.copy(b / name, mixed / name)
        assert code_of(load, mixed) == "T702"
        (mixed / name).write_bytes(b"nonsense")
        assert code_of(load, mixed) == "T702"
        (mixed / name).unlink()
        assert code_of(load, mixed) == "T702"
        shutil.rmtree(mixed)
    other = create(tmp_path / "other", "hospitals", ["localhost"], 30)  # the same name, another authority
    shutil.copy(other.folder / "authority" / "certificate.pem", a / "authority.pem")
    assert code_of(load, a) == "T705"


def test_dates_are_judged_with_the_reason(authority: Authority) -> None:
    folder = authority.issue("a", 30)
    for shift, word in (
        (timedelta(days=31), "keys renew a"),
        (timedelta(hours=-2), "set this machine's clock"),
    ):
        with pytest.raises(FedtuneError, match=f"T704.*{word}"):
            load(folder, now=utc_now() + shift)
    assert load(folder, now=utc_now() - timedelta(minutes=50)).name.name == "a"  # a clock that is behind


def test_rotation_leaves_both_keys_valid_until_one_ends_or_is_revoked(authority: Authority) -> None:
    old = load(authority.issue("a", 30))
    new = load(authority.renew("a", 90))
    allowed = AllowList(authority.allowed)
    allowed.check(old.peer)
    allowed.check(new.peer)
    later = utc_now() + timedelta(days=31)
    allowed.check(new.peer, later)
    assert code_of(allowed.check, old.peer, later) == "T704"
    revoke(authority.place("coordinator"), "a", old.peer.key[:12])
    assert code_of(allowed.check, old.peer) == "T706"
    allowed.check(new.peer)
    assert code_of(revoke, authority.place("coordinator"), "a", old.peer.key[:12]) == "T708"  # once
    revoke(authority.place("coordinator"), "a")
    assert code_of(allowed.check, new.peer) == "T706"
    assert load(authority.issue("a", 30)).peer.key not in (
        old.peer.key,
        new.peer.key,
    )  # a revoked name may come back


def test_the_coordinator_is_renewed_with_its_hosts_and_its_list(authority: Authority) -> None:
    site = load(authority.issue("a", 30))
    before = load(authority.place("coordinator"))
    after = load(authority.renew("coordinator", 60))
    assert after.peer.key != before.peer.key and authority.allowed.exists()
    AllowList(authority.allowed).check(site.peer)
    assert {entry.name for entry in read_entries(authority.allowed)} == {"a", "coordinator"}
    from fedtune.trust.authority import hosts_of
    from fedtune.trust.certificates import read_certificate

    assert hosts_of(read_certificate(after.certificate, "")) == ["localhost"]


def test_a_key_of_the_authority_that_is_not_on_the_list_is_nobody(
    authority: Authority, tmp_path: Path
) -> None:
    shutil.copytree(authority.folder, tmp_path / "thief")
    stolen: Identity = load(open_authority(tmp_path / "thief").issue("mallory", 30))
    assert code_of(AllowList(authority.allowed).check, stolen.peer) == "T706"
    load(authority.issue("mallory", 30))  # the name alone does not help
    assert code_of(AllowList(authority.allowed).check, stolen.peer) == "T706"


def test_a_damaged_or_missing_list_lets_nobody_in(authority: Authority) -> None:
    site = load(authority.issue("a", 30))
    allowed = AllowList(authority.allowed)
    content = authority.allowed.read_bytes()
    for damage in (b"", b"{", b'{"keys": [{"name": "a"}]}', b"[]", content[:-40]):
        authority.allowed.write_bytes(damage)
        assert code_of(allowed.check, site.peer) == "T702"
    authority.allowed.unlink()
    assert code_of(allowed.check, site.peer) == "T702"
    authority.allowed.write_bytes(content)
    allowed.check(site.peer)


def test_names_that_are_taken_or_not_in_their_form_are_refused(authority: Authority) -> None:
    authority.issue("a", 30)
    for name in ("a", "coordinator", "", "A", "-a", "a/b", "..", "a" * 64, "a b", "a\n"):
        assert code_of(authority.issue, name, 30) == "T708"
    assert (
        code_of(authority.renew, "nobody", 30)
        == "T708"
        == code_of(revoke, authority.place("coordinator"), "nobody")
    )
    for host in ("", "https://x", "x:80", "a b"):
        assert code_of(create, authority.folder.parent / "fresh", "f", [host], 1) == "T708"
    assert code_of(create, authority.folder, "f", ["localhost"], 1) == "T708"


def test_a_crash_between_two_renames_is_mended_by_the_next_command(authority: Authority) -> None:
    first = load(authority.issue("a", 30)).peer.key
    for name in ("a", "coordinator"):
        authority.place(name).rename(authority.place(name).with_name(f".{name}.old"))
    revoke(authority.place("coordinator"), "a")
    assert load(authority.place("a")).peer.key == first and load(authority.place("coordinator"))


def test_a_write_that_fails_leaves_the_list_as_it_was(
    authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority.issue("a", 30)
    before = authority.allowed.read_bytes()
    monkeypatch.setattr(
        os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    assert code_of(revoke, authority.place("coordinator"), "a") == "R404"
    assert authority.allowed.read_bytes() == before and not list(authority.allowed.parent.glob(".*.part"))


def test_private_files_elsewhere_are_missing_with_a_sentence(tmp_path: Path) -> None:
    assert code_of(load, tmp_path / "nowhere") == "T702" == code_of(private.read, tmp_path / "nothing")


def test_the_first_process_makes_a_shared_key_and_nobody_else_may_read_it(tmp_path: Path) -> None:
    path = tmp_path / "gateway" / "split.key"
    script = (
        "import sys; from pathlib import Path; from fedtune.trust.private import shared_key; "
        "print(shared_key(Path(sys.argv[1])).hex())"
    )
    racers = [
        subprocess.Popen([sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    assert {one.communicate()[0].strip() for one in racers} == {private.shared_key(path).hex()} and len(
        private.shared_key(path)
    ) == 32
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and [one.name for one in path.parent.iterdir()] == [
        "split.key"
    ]
    path.chmod(0o640)
    with pytest.raises(FedtuneError, match="T701"):
        private.shared_key(path)
    path.chmod(0o600)
    path.write_bytes(b"short")
    with pytest.raises(FedtuneError, match="T702"):
        private.shared_key(path)

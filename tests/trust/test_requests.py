"""Keys made at the site: no private key on the operator's machine, no certificate for somebody else's
keys."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import stat
from pathlib import Path

import pytest

from fedtune.cli import main
from fedtune.errors import FedtuneError
from fedtune.trust import AllowList, load, requests
from fedtune.trust.authority import Authority, create


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return create(tmp_path / "operator", "hospitals", ["localhost"], 30)


def test_a_site_gets_its_certificate_and_keeps_its_keys(
    authority: Authority, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    site, operator = tmp_path / "site", str(authority.folder)
    site.mkdir()
    assert main(["keys", "request", "site-a", "--federation", "hospitals", "--to", str(site / "site-a")]) == 0
    mark = re.search(r"fingerprint  (\S+)", capsys.readouterr().out)
    assert main(["keys", "sign", str(site / "site-a.request"), "--keys", operator]) == 0
    assert mark and mark[1] in capsys.readouterr().out
    assert main(["keys", "accept", str(site / "site-a.answer"), "--to", str(site / "site-a")]) == 0
    identity = load(site / "site-a")
    assert identity.name.name == "site-a" and identity.name.federation == "hospitals"
    AllowList(authority.allowed).check(identity.peer)
    secrets = [(site / "site-a" / name).read_bytes() for name in ("key.pem", "signing-key.pem")]
    elsewhere = [
        path.read_bytes()
        for path in [*authority.folder.rglob("*"), site / "site-a.request", site / "site-a.answer"]
        if path.is_file()
    ]
    assert not any(
        secret in content or secret.split(b"\n")[1] in content for secret in secrets for content in elsewhere
    )
    assert not (authority.folder / "clients").exists()
    assert all(
        stat.S_IMODE((site / "site-a" / name).stat().st_mode) == 0o600
        for name in ("key.pem", "signing-key.pem")
    )
    assert (
        main(["keys", "sign", str(site / "site-a.request"), "--keys", operator]) == 2
        and "signed before" in capsys.readouterr().err
    )
    assert (
        main(["keys", "request", "site-a", "--federation", "hospitals", "--to", str(site / "site-a")]) == 2
    )  # keys are not made over


def test_a_request_is_good_for_its_own_keys_and_its_own_federation_only(
    authority: Authority, tmp_path: Path
) -> None:
    mine, _ = requests.make(tmp_path / "a" / "site-a", "hospitals", "site-a")
    other, _ = requests.make(tmp_path / "b" / "site-b", "hospitals", "site-b")
    one, two = (json.loads(path.read_bytes()) for path in (mine, other))
    for part in ("record", "signature", "proof"):  # somebody else's keys, or a name put in
        with pytest.raises(FedtuneError, match="T707"):
            authority.sign(json.dumps(one | {part: two[part]}).encode(), 30)
    forged = base64.b64encode(base64.b64decode(one["record"]).replace(b"site-a", b"site-z")).decode()
    with pytest.raises(FedtuneError, match="T707"):
        authority.sign(json.dumps(one | {"record": forged}).encode(), 30)
    for name in ("coordinator",):
        odd, _ = requests.make(tmp_path / "c" / name, "hospitals", name)
        with pytest.raises(FedtuneError, match="T708"):
            authority.sign(odd.read_bytes(), 30)
    stranger, _ = requests.make(tmp_path / "d" / "site-a", "banks", "site-a")
    with pytest.raises(FedtuneError, match="T708"):
        authority.sign(stranger.read_bytes(), 30)
    for nonsense in (
        b"",
        b"{}",
        b"[]",
        b'{"record": "eA==", "signature": "eA==", "proof": "eA=="}',
        b'{"record": 1}',
    ):
        with pytest.raises(FedtuneError, match="T702"):
            authority.sign(nonsense, 30)


def test_an_answer_for_other_keys_is_not_taken(authority: Authority, tmp_path: Path) -> None:
    mine, _ = requests.make(tmp_path / "a" / "site-a", "hospitals", "site-a")
    requests.make(tmp_path / "b" / "site-a", "hospitals", "site-a")
    _, answer = authority.sign(mine.read_bytes(), 30)
    with pytest.raises(FedtuneError, match="T702: found an answer for other keys"):
        requests.accept(tmp_path / "b" / "site-a", answer)
    assert not (tmp_path / "b" / "site-a" / "certificate.pem").exists()
    assert requests.accept(tmp_path / "a" / "site-a", answer).name.name == "site-a"


def test_a_mark_is_the_beginning_of_the_records_hash_in_fours(tmp_path: Path) -> None:
    path, mark = requests.make(tmp_path / "site-a", "hospitals", "site-a")
    content = path.read_bytes()
    digits = hashlib.sha256(base64.b64decode(json.loads(content)["record"])).hexdigest()
    assert mark == requests.mark(content) == "-".join([digits[0:4], digits[4:8], digits[8:12], digits[12:16]])
    asked = requests.read(content)
    assert (asked.federation, asked.name) == ("hospitals", "site-a")


def test_a_file_that_is_no_request_is_named(tmp_path: Path) -> None:
    path = tmp_path / "site-a.request"
    for size, code in ((requests.LONGEST, ""), (requests.LONGEST + 1, "T702")):
        path.write_bytes(bytes(size))
        if code:
            with pytest.raises(FedtuneError, match=f"{code}.*{path}"):
                requests.content_of(path)
        else:
            assert len(requests.content_of(path)) == size
    with pytest.raises(FedtuneError, match=r"T702.*a valid request"):
        requests.mark(b"none")
    with pytest.raises(FedtuneError, match=r"T702.*a valid answer"):
        requests.accept(tmp_path, b"none")

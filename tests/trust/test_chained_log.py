"""A log whose lines hold on to each other: whatever is changed, the first bad line is named."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from fedtune.errors import FedtuneError
from fedtune.trust import load
from fedtune.trust.authority import Authority, create
from fedtune.trust.certificates import utc_now
from fedtune.trust.chained_log import ChainedLog, hash_of, verify

NOW = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    made = create(tmp_path_factory.mktemp("keys") / "keys", "hospitals", ["localhost"], 30)
    made.issue("site-a", 30)
    return made


@pytest.fixture
def log(authority: Authority, tmp_path: Path) -> Path:
    """A key line and four more, of two processes."""
    path = tmp_path / "audit.jsonl"
    member = load(authority.place("site-a"))
    for numbers in ((1, 2), (3, 4)):
        made = ChainedLog(path, lambda: member)
        for number in numbers:
            made.write("sent", utc_now(), round=number, loss=float("nan"))
    return path


def edited(change: Callable[[list[str]], list[str]], path: Path) -> None:
    path.write_text("".join(change(path.read_text().splitlines(keepends=True))))


def rehashed(line: str) -> str:
    """A line with other facts, and the hash that belongs to them."""
    tree = json.loads(line) | {"round": 99}
    body = {key: value for key, value in tree.items() if key not in ("hash", "signature")}
    return json.dumps(tree | {"hash": hash_of(body)}) + "\n"


def test_a_log_in_order_says_who_kept_it(log: Path, authority: Authority) -> None:
    found = verify(log, authority.certificate)
    assert (found.lines, found.signer) == (5, "site-a") and verify(log) == found
    assert json.loads(log.read_text().splitlines()[-1])["hash"] == found.last


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda all: [*all[:2], all[2].replace('"round": 2', '"round": 7'), *all[3:]], "line 3 .* another content"),
        (lambda all: [*all[:2], rehashed(all[2]), *all[3:]], "line 3 .* is not signed as it says"),
        (lambda all: [*all[:2], *all[3:]], "line 3 .* does not follow from the line before"),
        (lambda all: [all[0], all[1], all[3], all[2], all[4]], "line 3 .* does not follow"),
        (lambda all: [*all, all[4]], "line 6 .* does not follow"),
        (lambda all: [*all[:3], "{\n", *all[3:]], "line 4 .* is no line of an audit log"),
        (lambda all: [all[0].replace('"signature": "', '"signature": "AA'), *all[1:]], "line 1 .* is not signed"),
        (lambda all: [*all[:4], "x" * 70000 + "\n"], "line 5 .* is no line"),
    ],
)  # fmt: skip
def test_the_first_bad_line_is_named(
    change: Callable[[list[str]], list[str]], said: str, log: Path, authority: Authority
) -> None:
    edited(change, log)
    with pytest.raises(FedtuneError, match=f"T709: {said}"):
        verify(log, authority.certificate)


def test_a_stranger_cannot_keep_a_members_log(log: Path, tmp_path: Path) -> None:
    other = create(tmp_path / "other", "hospitals", ["localhost"], 30)
    assert verify(log).signer == "site-a"
    with pytest.raises(FedtuneError, match=r"T709: line 1 .* is not signed"):
        verify(log, other.certificate)


def test_a_line_that_a_crash_cut_was_never_written(log: Path, authority: Authority) -> None:
    with log.open("a") as file:
        file.write('{"what": "se')
    member = load(authority.place("site-a"))
    ChainedLog(log, lambda: member).write("sent", utc_now(), round=5)
    assert verify(log, authority.certificate).lines == 6


def test_nothing_is_added_to_a_log_that_was_changed(log: Path, authority: Authority) -> None:
    edited(lambda all: [*all[:2], *all[3:]], log)
    member = load(authority.place("site-a"))
    with pytest.raises(FedtuneError, match="T709: line 3"):
        ChainedLog(log, lambda: member).write("sent", utc_now(), round=5)


def test_a_log_without_keys_is_chained_all_the_same(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    log = ChainedLog(path)
    log.write("a", NOW)
    log.write("b", NOW + timedelta(1))
    assert (verify(path).lines, verify(path).signer) == (2, "")
    edited(lambda all: all[1:], path)
    with pytest.raises(FedtuneError, match="T709: line 1"):
        verify(path)
    with pytest.raises(FedtuneError, match="C105"):
        verify(tmp_path / "none.jsonl")


def test_a_lines_hash_is_that_of_its_json_without_spaces() -> None:
    """What another program has to do to check a log."""
    body = {"b": 1, "a": "é", "c": None}
    wanted = hashlib.sha256(b'{"a":"\\u00e9","b":1,"c":null}').hexdigest()
    assert hash_of(body) == wanted


def test_a_bad_log_is_named(log: Path, tmp_path: Path) -> None:
    edited(lambda all: [*all[:2], "{\n"], log)
    with pytest.raises(FedtuneError, match=f"T709: line 3 of '{log}' is no line of an audit log"):
        verify(log)
    with pytest.raises(FedtuneError, match=f"R404.*{tmp_path}"):
        verify(tmp_path)
    edited(lambda all: [rehashed(all[0])], log)
    with pytest.raises(FedtuneError, match="an line whose signature does not match"):
        verify(log)

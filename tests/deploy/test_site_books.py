"""What a site's operator sees of its own site: what left, the receipts for it, and that old ones go when they
are told to."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from fedtune.cli import main
from fedtune.deploy.site_books import DAY, LEDGER, Sent, forget, ledger, note_sent, sent_since
from fedtune.events import Noted
from fedtune.runtime.journal import Journal
from tests import small
from tests.deploy.inside import FakeGrid, Inside, inside
from tests.e2e.deploying import MEMORY


@pytest.fixture(scope="module")
def played(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Inside:
    """A run of two rounds that has ended."""
    root = tmp_path_factory.mktemp("books")
    (root / "rows").mkdir()
    with inside(root, tiny_bert, small.write_rows(root / "rows"), rounds=2, **MEMORY) as made:
        made.conduct(FakeGrid(made.workers()))
        return made


def test_the_site_sees_what_left_it(played: Inside, capsys: pytest.CaptureFixture[str]) -> None:
    """Round, recipe, rows, bytes and hash: on its console, in its ledger, and as the coordinator counted it."""
    home = played.root / "home-site-a"
    journal = Journal(played.folder.journal)
    counted = [answer.up_bytes for _, answer in journal.answers() if answer.client == 0]
    journal.close()
    said = [event.text for event in played.told["site-a"] if isinstance(event, Noted)]
    left = [sent for sent in ledger(home) if sent.verb == "train"]
    assert [sent.bytes for sent in left] == counted and [sent.round for sent in left] == [1, 2]
    for sent in left:
        assert sent.rows > 20 and sent.recipe == played.recipe.fingerprint[:16]
        assert any(sent.sha256[:16] in text and f"{sent.bytes:,} bytes" in text for text in said)
        assert any(f"of {sent.rows} rows" in text and sent.recipe in text for text in said)
    assert main(["site", "status", "--home", str(home)]) == 0
    out = capsys.readouterr().out
    assert all(sent.sha256[:16] in out for sent in left) and f"{played.run[:27]} " in out


def test_receipts_are_read_and_a_false_one_is_named(
    played: Inside, capsys: pytest.CaptureFixture[str]
) -> None:
    home, keys = played.root / "home-site-b", str(played.authority.place("site-b"))
    command = ["site", "receipts", "--home", str(home), "--keys", keys]
    assert main(command) == 0
    out = capsys.readouterr().out.splitlines()
    assert len(out) >= 2 and all("in the ledger" in line and "not in" not in line for line in out)
    held = sorted((home / "spool").glob("*.receipt"))[0]
    content = held.read_text()
    held.write_text(content.replace('"signature": "', '"signature": "AAAA', 1))
    try:
        assert main(command) == 2
        told = capsys.readouterr()
        assert "proves nothing" in told.out and "T707" in told.err
    finally:
        held.write_text(content)
    (home / LEDGER).rename(home / "aside")  # receipts of what the ledger does not know are said, too
    assert main(command) == 0 and "not in the ledger" in capsys.readouterr().out
    (home / "aside").rename(home / LEDGER)


def test_what_is_old_goes_and_what_the_policy_counts_stays(tmp_path: Path) -> None:
    now = time.time()
    (tmp_path / "spool").mkdir()
    for days in (400, 40, 0.5):
        note_sent(tmp_path, Sent(now - days * DAY, int(days)))
        path = tmp_path / "spool" / f"{int(days)}.receipt"
        path.write_text("{}")
        os.utime(path, (now - days * DAY, now - days * DAY))
    with (tmp_path / LEDGER).open("a") as file:
        file.write('{"cut')
    assert forget(tmp_path, 100, now) == 2 and [sent.bytes for sent in ledger(tmp_path)] == [40, 0]
    assert forget(tmp_path, 0.001, now) == 2 and sent_since(tmp_path, now - DAY) == (0,)
    assert sorted(path.name for path in (tmp_path / "spool").iterdir()) == ["0.receipt"]


def test_a_home_that_is_none_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["site", "status", "--home", str(tmp_path / "none")]) == 2
    assert "C105" in capsys.readouterr().err

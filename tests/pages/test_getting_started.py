"""The path of docs/getting-started.md, walked as it stands on a tiny model and a quick run: the commands work one after
the other, and print the lines that the page shows (their first words: numbers are those of the page's own run)."""

from __future__ import annotations

import contextlib
import csv
import io
import re
import runpy
import shlex
from pathlib import Path

import pytest

from fedtune.cli import main
from tests import tiny
from tests.pages.blocks import ROOT, Block, blocks_of

PAGE = list(blocks_of(ROOT / "docs" / "getting-started.md"))
QUICK = {  # added to the page's command
    "init": ["--model", "model"],
    "simulate": [f"--set={key}" for key in ("rounds=2", "method.train.steps=1", "method.head_start=random")],
}


def steps(block: Block) -> list[tuple[str, list[str]]]:
    """Each command of a console block with the lines below it."""
    found: list[tuple[str, list[str]]] = []
    for line in block.text.splitlines():
        if line.startswith("$ "):
            found.append((line[2:], []))
        else:
            found[-1][1].append(line)
    return found


def first_words(lines: list[str]) -> set[str]:
    """Of lines that begin with one: rows of a table that begin with a number are the page's own."""
    return {
        words[0] for line in lines if line.strip() and (words := re.findall(r"[^\W\d_]+", line.split()[0]))
    }


def said_by(command: str) -> list[str]:
    words = shlex.split(command)
    assert words[0] == "fedtune"
    out, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        code = main([*words[1:], *QUICK.get(words[1], [])])
    assert code == 0, f"{command}: {errors.getvalue()}"
    return [*out.getvalue().splitlines(), *errors.getvalue().splitlines()]


@pytest.mark.thorough
def test_the_path_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny.llama(tmp_path / "model", chat=False)  # byte pairs: it knows every word
    (tmp_path / "make_rows.py").write_text(next(b.text for b in PAGE if b.title == "make_rows.py"))
    runpy.run_path("make_rows.py")
    for command, shown in [
        pair for b in PAGE if b.language == "console" and b.text.startswith("$") for pair in steps(b)
    ]:
        if found := re.fullmatch(r"head -(\d+) (\S+) > (\S+)", command):
            lines = Path(found[2]).read_text().splitlines(keepends=True)
            Path(found[3]).write_text("".join(lines[: int(found[1])]))
            continue
        said = said_by(command)
        missing = first_words(shown) - first_words(said)
        assert not missing, f"{command} prints no line that begins with {missing}:\n" + "\n".join(said)
    with open("said.csv", encoding="utf-8") as file:
        assert len(list(csv.DictReader(file))) == 3
    script = next(b for b in PAGE if b.language == "python" and not b.title)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(script.text, str(script), "exec"), {})
    assert len(out.getvalue().splitlines()) == 3

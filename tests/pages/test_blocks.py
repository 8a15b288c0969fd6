"""Every code block of every page is checked by what its language says: commands by the programs' own parsers, recipes
and policies by what reads them, Python by running it. A block that none of them knows fails."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from fedtune import config
from fedtune.deploy.policy import read_policy
from tests import small
from tests.pages.blocks import ROOT, Block, blocks, blocks_of
from tests.pages.commands import commands, wrong
from tests.pages.test_python import ELSEWHERE, RUN

BLOCKS = blocks()
CHECKED = {"console", "indented", "ini", "python", "sh", "toml"}
PLAIN = {"text"}  # output and figures: nothing that a program reads


def of(*languages: str) -> list[Block]:
    return [block for block in BLOCKS if block.language in languages]


def test_every_block_says_what_it_is() -> None:
    odd = [str(block) for block in BLOCKS if block.language not in CHECKED | PLAIN]
    assert not odd, "no language, or one that no test knows"
    indented = {block.page for block in of("indented")}
    assert not [page for page in indented if page.startswith("docs/")], "fence it, and name its language"
    assert len(of("console", "sh")) > 30 and len(of("toml")) > 8 and len(of("python")) > 8


def test_commands_are_what_their_programs_take() -> None:
    said = [
        f"{block}: {line}: {problem}"
        for block in of("console", "indented", "sh")
        for line in commands(block.text)
        if (problem := wrong(line))
    ]
    assert not said, "\n".join(said)


def test_what_units_start_is_a_command() -> None:
    started = [
        (block, line)
        for block in of("ini")
        for line in re.findall(r"^ExecStart=(.*)$", block.text.replace("\\\n", " "), re.M)
    ]
    assert len(started) == len(of("ini")) and not [
        f"{block}: {problem}" for block, line in started if (problem := wrong(line))
    ]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("fedtune simulate my.toml --set rounds=3  # quick", ""),
        ("fedtune simulate my.toml --sets rounds=3", "unrecognized arguments: --sets"),
        ("fedtune nothing", "invalid choice: 'nothing'"),
        ("fedtune export RUN", "required: --to"),
        ("A=1 fedtune check a.toml && fedtune check --nonsense", "unrecognized arguments"),
        ("pip install 'fedtune[flower]'", ""),
        ("pip install -c constraints.txt -e '.[nonsense]'", "no extra nonsense"),
        ("python benchmarks/codec.py --tiny", ""),
        ("python benchmarks/codec.py --nonsense", "has no --nonsense"),
        ("python benchmarks/nothing.py", "no file"),
        ("docker compose --profile nothing up", "has no nothing"),
        ("pytest tests/nothing", "no tests/nothing"),
        ("frobnicate my.toml", "no known program 'frobnicate'"),
    ],
)
def test_a_command_that_is_wrong_is_noticed(line: str, said: str) -> None:
    assert (said in wrong(line)) if said else wrong(line) == ""


def recipe_of(tree: dict[str, Any], folder: Path) -> None:
    """Read a recipe as `fedtune check` does; a part of one stands in a small whole one."""
    if not tree.keys() >= {"model", "data"}:
        tree = merged(small.tree(folder, folder / "rows.jsonl"), tree)
    config.parse(tree)


def merged(whole: dict[str, Any], part: dict[str, Any]) -> dict[str, Any]:
    """What a page shows of a recipe, over a recipe; another method or union member replaces the one that was there."""
    out = dict(whole)
    for key, value in part.items():
        inside = isinstance(value, dict) and isinstance(out.get(key), dict)
        other = inside and any(value.get(tag, out[key].get(tag)) != out[key].get(tag) for tag in TAGS)
        out[key] = merged(out[key], value) if inside and not other else value
    return out


TAGS = ("type", "source", "by", "kind", "rule")


@pytest.mark.parametrize("block", of("toml"), ids=str)
def test_toml_is_what_reads_it_takes(block: Block, tmp_path: Path) -> None:
    tree = tomllib.loads(block.text)
    if block.title == "policy.toml":
        (tmp_path / "policy.toml").write_text(block.text)
        assert read_policy(str(tmp_path / "policy.toml")).approved_only
    elif block.title == "pyproject.toml":  # of the package that tests/test_extending.py builds
        assert block.page == "docs/extending.md"
    elif block.title == "~/.flwr/config.toml":  # Flower's own
        assert tree.keys() == {"superlink"}
    else:
        recipe_of(tree, tmp_path)


def test_python_that_is_not_run_by_itself_is_run_by_a_test_of_its_page() -> None:
    for page, test in ELSEWHERE.items():
        assert page.rpartition("/")[2] in (ROOT / test).read_text(encoding="utf-8")
    assert len(RUN) >= 4 and all(not block.title for block in RUN)


def test_blocks_are_found_fenced_or_not(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "text\n\n    fedtune check a\n    fedtune check b\n\n* item\n\n    its second paragraph\n\n"
        '        fedtune check c\n\n```toml title="a.toml"\nrounds = 1\n```\n\n* item\n\n    ```\n    x\n    ```\n'
    )
    found = [(block.language, block.title, block.text) for block in blocks_of(page, tmp_path)]
    assert found == [
        ("indented", "", "fedtune check a"), ("indented", "", "fedtune check b"), ("indented", "", "fedtune check c"),
        ("toml", "a.toml", "rounds = 1"), ("", "", "x"),
    ]  # fmt: skip

"""The code blocks of the pages, fenced or indented, with the language that says how a test checks them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    [
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")),
        ROOT / "simulations" / "README.md",
        *(ROOT / "docs").rglob("*.md"),
    ]
)
ITEM = re.compile(r"([*-]|\d+\.) ")
FENCE = re.compile(r"^( *)(`{3,}|~{3,})(.*)$")


@dataclass(frozen=True)
class Block:
    page: str  # from the repository's root
    line: int
    language: str  # "" where the page says none; "indented" without a fence
    title: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks() -> list[Block]:
    return [block for path in PAGES for block in blocks_of(path)]


def blocks_of(path: Path, root: Path = ROOT) -> Iterator[Block]:
    page = str(path.relative_to(root))
    lines = enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
    before, listed = "", False  # the line above; whether the paragraph above belongs to an item of a list
    for number, line in lines:
        if line[:1].strip() and (ITEM.match(line) or not before.strip()):
            listed = bool(ITEM.match(line))
        if fence := FENCE.match(line):
            indent, mark, info = fence.groups()
            inside = []
            for _, line in lines:
                if line.strip() == mark:
                    break
                inside.append(line.removeprefix(indent))
            title = re.search(r'title="([^"]*)"', info)
            language = info.split()[0] if info.strip() else ""
            yield Block(page, number, language, title[1] if title else "", "\n".join(inside))
        elif (
            line.startswith(" " * (8 if listed else 4)) and not before.strip()
        ):  # its lines are commands, each on its own
            yield Block(page, number, "indented", "", line.strip())
            continue  # `before` stays blank: the next indented line is of the same block
        before = line

"""docs/decisions/index.md: the decisions, by the first lines of their pages."""

from __future__ import annotations

import re
from pathlib import Path

from tests.regen.docs import NOTE, cell

ROOT = Path(__file__).resolve().parents[2]
ABOUT = """# Decisions

Why things are as they are: one page for a question that could have been answered otherwise, with what was chosen, why, what was given up,
and how it would show that the choice was wrong.

| | decision | question |
|---|---|---|
"""


def generate() -> dict[str, str]:
    rows = []
    for path in sorted((ROOT / "docs" / "decisions").glob("[0-9]*.md")):
        text = path.read_text(encoding="utf-8")
        number, title = re.match(r"# (\d+)\. (.*)", text).groups()  # type: ignore[union-attr]
        asked = re.search(r"\*\*Question\.\*\* (.*?)\n\n", text, re.S)
        rows.append(f"| {number} | [{cell(title)}]({path.name}) | {cell(asked[1]) if asked else ''} |")
    return {"docs/decisions/index.md": f"{NOTE}\n{ABOUT}" + "\n".join(rows) + "\n"}

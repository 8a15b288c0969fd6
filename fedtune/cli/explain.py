"""fedtune explain: what an error code means, its usual causes, and how to fix it."""

from __future__ import annotations

import argparse
import difflib
import textwrap
import tomllib
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from fedtune.errors import CATALOGUE, FedtuneError

WIDTH = 100  # columns of a page


@dataclass(frozen=True)
class Page:
    """What happened, in one sentence; the usual causes; what to do."""

    what: str
    why: tuple[str, ...]
    fix: tuple[str, ...]


def add_commands(commands: Any) -> None:
    parser = commands.add_parser(
        "explain",
        help="what an error code means, its usual causes, and how to fix it",
        description=__doc__,
    )
    parser.add_argument(
        "code", nargs="?", help="an error code, such as C101; without one, all codes are listed"
    )
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    if options.code is None:
        print("\n".join(f"{code}  {sentence}" for code, sentence in CATALOGUE.items()))
    else:
        print(page(options.code.upper()))
    return 0


def page(code: str) -> str:
    """The page of a code, as text of a terminal. Raises C103."""
    if code not in CATALOGUE:
        near = difflib.get_close_matches(code, CATALOGUE, 3, 0.5)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise FedtuneError(
            "C103",
            sentence=f"there is no error code '{code}'",
            do=f"{hint}all codes are listed by: fedtune explain",
        )
    said = pages()[code]
    return "\n\n".join(
        [
            textwrap.fill(f"{code}: {said.what}", WIDTH),
            "Usual causes:\n" + items(said.why),
            "What to do:\n" + items(said.fix),
        ]
    )


def items(lines: tuple[str, ...]) -> str:
    return "\n".join(
        textwrap.fill(line, WIDTH, initial_indent="  * ", subsequent_indent="    ", break_on_hyphens=False)
        for line in lines
    )


def pages() -> dict[str, Page]:
    """All pages, by their code."""
    known = tomllib.loads(files("fedtune").joinpath("error_pages.toml").read_text(encoding="utf-8"))
    return {
        code: Page(table["what"], tuple(table["why"]), tuple(table["fix"])) for code, table in known.items()
    }

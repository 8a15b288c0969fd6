"""docs/cli.md: what `--help` says of every command, from the parser itself, so that Python's versions do not
lay it out differently."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from tests.regen.docs import NOTE, cell

CODES = """Exit codes: 0 done, 2 a mistake that you can fix (one sentence with a [code](errors.md) on stderr, see `fedtune explain`), 70 a defect of
fedtune, 75 a run that paused below its quorum, 130 interrupted. `FEDTUNE_DEBUG=1` shows the traceback of a defect.
"""


def generate() -> dict[str, str]:
    from fedtune.cli import build_parser

    parser = build_parser()
    lines = [NOTE, "# Commands\n", f"{parser.description}\n", CODES]
    found = list(commands(parser, ""))
    lines += ["| command | what it does |", "|---|---|"]
    lines += [f"| [`{name}`](#{name.replace(' ', '-')}) | {cell(about)} |" for name, about, _ in found]
    lines.append("")
    for name, about, command in found:
        lines += page(name, about, command)
    return {"docs/cli.md": "\n".join(lines)}


def commands(
    parser: argparse.ArgumentParser, about: str
) -> Iterator[tuple[str, str, argparse.ArgumentParser]]:
    """Name, one line and parser of every command that can be run."""
    below = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not below:
        yield parser.prog, about, parser
    for action in below:
        said = {choice.dest: choice.help or "" for choice in action._choices_actions}
        for name, command in action.choices.items():
            yield from commands(command, said[name])


def page(name: str, about: str, parser: argparse.ArgumentParser) -> list[str]:
    actions = [
        action
        for action in parser._actions
        if action.help != argparse.SUPPRESS and not isinstance(action, argparse._HelpAction)
    ]
    words = [usage(action) for action in sorted(actions, key=lambda action: bool(action.option_strings))]
    rows = [f"| `{usage(action).strip('[]')}` | {cell(meaning(action))} |" for action in actions]
    lines = [
        f"## {name}\n",
        f"{about[:1].upper()}{about[1:]}.\n",
        f"```text\n{' '.join([name, *words])}\n```\n",
    ]
    return [*lines, "| argument | meaning |", "|---|---|", *rows, ""] if rows else lines


def usage(action: argparse.Action) -> str:
    """`[--set PATH=VALUE]`, `NAME`, `ADAPTER...`"""
    value = str(action.metavar or action.dest).upper()
    if action.option_strings:
        word = (
            action.option_strings[-1]
            + ("" if action.nargs == 0 else f" {value}")
            + ("..." if action.nargs == "+" else "")
        )
        return word if action.required else f"[{word}]"
    return f"[{value}]" if action.nargs == "?" else f"{value}..." if action.nargs in ("+", "*") else value


def meaning(action: argparse.Action) -> str:
    """The help line, with the choices and a default that it does not say itself."""
    said = (
        (action.help or "") % {"default": action.default, "prog": ""}
        if "%(" in (action.help or "")
        else action.help or ""
    )
    choices = (
        f"; one of {', '.join(f'`{choice}`' for choice in action.choices if choice != '')}"
        if action.choices
        else ""
    )
    shown = action.default not in (None, "", 0, False, [], argparse.SUPPRESS) and "default" not in said
    return f"{said}{choices}" + (f" (default: `{action.default}`)" if shown else "")

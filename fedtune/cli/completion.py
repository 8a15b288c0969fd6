"""fedtune completion: a script by which a shell completes commands, options and files."""

from __future__ import annotations

import argparse
from typing import Any

SHELLS = ("bash", "zsh", "fish")
INSTALL = {
    "bash": 'eval "$(fedtune completion bash)"  in ~/.bashrc',
    "zsh": "fedtune completion zsh > ~/.zfunc/_fedtune, where fpath has ~/.zfunc",
    "fish": "fedtune completion fish > ~/.config/fish/completions/fedtune.fish",
}


def add_commands(commands: Any) -> None:
    parser = commands.add_parser(
        "completion",
        help="print a script by which a shell completes fedtune's commands and options",
        description=f"{__doc__} To install it: " + "; ".join(INSTALL.values()) + ".",
    )
    parser.add_argument("shell", choices=SHELLS, help="; ".join(INSTALL.values()))
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    import shtab

    complete_files(options.parser, shtab.FILE)
    print(shtab.complete(options.parser, shell=options.shell))
    return 0


def complete_files(parser: argparse.ArgumentParser, files: Any) -> None:
    """Arguments that are paths are completed as such, in every command."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for below in set(action.choices.values()):
                complete_files(below, files)
        elif is_path(action):
            action.complete = files  # type: ignore[attr-defined]


def is_path(action: argparse.Action) -> bool:
    if action.choices or action.nargs == 0:
        return False
    return action.metavar in ("FILE", "DIR", "PATH", "RUN", "ADAPTER") or (
        not action.option_strings and action.dest in ("recipe", "run", "runs", "model", "data", "source")
    )

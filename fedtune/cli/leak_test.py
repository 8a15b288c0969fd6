"""fedtune leak-test: what whoever runs the body can read off one batch of a client, by two known attacks on
the recipe's own cut."""

from __future__ import annotations

import argparse
from typing import Any

from fedtune.cli.common import add_recipe
from fedtune.quiet import quiet


def add_commands(commands: Any) -> None:
    parser = commands.add_parser(
        "leak-test",
        help="show what the body's operator can reconstruct from a client's batch (method sfprompt)",
        description=__doc__,
    )
    add_recipe(parser)
    parser.add_argument(
        "--client",
        type=int,
        default=0,
        metavar="N",
        help="whose training examples are attacked (default: client 0)",
    )
    parser.add_argument("--examples", type=int, default=8, metavar="N", help="how many of them (default: 8)")
    parser.add_argument(
        "--steps",
        type=int,
        default=600,
        metavar="N",
        help="steps of gradient descent, where that is the attack (default: 600)",
    )
    parser.set_defaults(command=leak_test)


def leak_test(options: argparse.Namespace) -> int:
    """Attack, and say what was recovered; the attacker knows the frozen head, which is public, and sees the
    numbers that go through the cut."""
    from fedtune.config import read

    recipe = read(options.recipe, options.set)
    quiet()
    from fedtune.runtime.split_leak import leaks, sentences

    print("\n".join(sentences(recipe, leaks(recipe, options.client, options.examples, options.steps))))
    return 0

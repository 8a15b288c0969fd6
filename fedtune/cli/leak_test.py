"""fedtune leak-test: what can be read off one batch of a client, by known attacks on the recipe's own
updates, or on its cut where the model is split."""

from __future__ import annotations

import argparse
from typing import Any

from fedtune.cli.common import add_recipe
from fedtune.cli.waits import waiting
from fedtune.quiet import quiet


def add_commands(commands: Any) -> None:
    parser = commands.add_parser(
        "leak-test",
        help="show what a client's update, or its hidden states where the model is split, give away",
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
        help="steps of gradient descent, where that is the attack on a split model (default: 600)",
    )
    parser.add_argument(
        "--match",
        type=int,
        default=0,
        metavar="N",
        help="search for texts whose gradient matches the update, in so many steps at each place; says first "
        "how long that takes (default: 0, not tried)",
    )
    parser.set_defaults(command=leak_test)


def leak_test(options: argparse.Namespace) -> int:
    """Attack, and say what was recovered; the attacker knows what is public, and sees what goes by."""
    from fedtune.config import method_of, read

    recipe = read(options.recipe, options.set)
    quiet()
    if method_of(recipe).capabilities.split is None:
        from fedtune.runtime import update_leak

        with waiting("attacking a client's answer"):
            found = update_leak.update_leaks(recipe, options.client, options.examples, options.match)
        print("\n".join(update_leak.sentences(found)))
        return 0
    from fedtune.runtime.split_leak import leaks, sentences

    with waiting("attacking hidden states"):
        leaking = leaks(recipe, options.client, options.examples, options.steps)
    print("\n".join(sentences(recipe, leaking)))
    return 0

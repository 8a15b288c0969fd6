"""What a sweep tries: settings of a recipe in every combination, each with several seeds."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedtune import config
from fedtune.config import Recipe
from fedtune.errors import FedtuneError
from fedtune.overrides import toml, value_of

Settings = Mapping[str, Any]  # dotted path of a recipe -> value
MOST = 1000  # runs of a sweep
# What a sweep's runs do not measure, because the runs are compared with one another.
QUICK = {"evaluate.base": False, "evaluate.local": False, "evaluate.centralised": False}


@dataclass(frozen=True)
class Trial:
    """One choice of settings; its runs differ in their seeds only."""

    number: int
    settings: Settings

    def run(self, seed: int) -> str:
        """The name of the run's folder."""
        return f"{self.number:03d}-seed-{seed}"


def grid(said: Sequence[str]) -> list[dict[str, Any]]:
    """Every combination of `path=value,value`, the last path changing fastest. Raises C103.

    >>> grid(["rounds=2,3", "method.adapter.rank=4"])
    [{'rounds': 2, 'method.adapter.rank': 4}, {'rounds': 3, 'method.adapter.rank': 4}]
    """
    axes = [axis(text) for text in said]
    if len({path for path, _ in axes}) < len(axes):
        raise FedtuneError(
            "C103", "--grid with a path twice", "each path once", "write all values behind one"
        )
    return combinations(dict(axes))


def combinations(axes: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Raises C103 for too many."""
    found = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    if len(found) > MOST:
        raise FedtuneError(
            "C103", f"a grid of {len(found)} combinations", f"at most {MOST}", "leave some out"
        )
    return found


def axis(text: str) -> tuple[str, list[Any]]:
    """A path and its values, each read as TOML, or as a bare text where it is none."""
    path, equals, rest = text.partition("=")
    values = [value_of(part) for part in split(rest)]
    if not equals or not path.strip() or not values or "" in values:
        raise FedtuneError(
            "C103", f"'{text}'", "path=value,value such as method.adapter.rank=4,8", "write path and values"
        )
    return path.strip(), values


def split(text: str) -> list[str]:
    """At commas outside of brackets and quotes.

    >>> split('["q", "v"],["q"],all')
    ['["q", "v"]', '["q"]', 'all']
    """
    parts, depth, quoted = [""], 0, ""
    for sign in text:
        if sign == quoted:
            quoted = ""
        elif not quoted and sign in "\"'":
            quoted = sign
        elif not quoted:
            depth += (sign in "[{") - (sign in "]}")
        if sign == "," and not depth and not quoted:
            parts.append("")
        else:
            parts[-1] += sign
    return [part.strip() for part in parts]


def recipe_of(base: Recipe, trial: Trial, seed: int, rounds: int = 0) -> Recipe:
    """The recipe of one run: scored on rows that clients hold out, since a choice by the test set would
    flatter. Raises C101 to C104."""
    changes = {**QUICK, **trial.settings, "seed": seed, "name": trial.run(seed)}
    known = changed(base, changes)
    if not known.evaluate.every:
        known = changed(known, {"evaluate.every": known.rounds})
    return known if not rounds else changed(known, {"rounds": rounds})


def changed(recipe: Recipe, changes: Settings) -> Recipe:
    tree = recipe.model_dump(mode="json", exclude_unset=True)
    return config.parse_with(tree, [f"{path}={toml(value)}" for path, value in changes.items()], "recipe")


def fingerprint(base: Recipe, what: Mapping[str, Any]) -> str:
    """SHA-256 of a sweep: it is gone on with only as it was begun."""
    text = json.dumps({"recipe": base.canonical(), **what}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()

"""Rules between settings that no single table can check: refused while reading, with the reason. All raise
C104."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from fedtune.aggregate import RULES, Rule
from fedtune.errors import FedtuneError
from fedtune.settings import Settings
from fedtune.transforms import Chain, build

if TYPE_CHECKING:
    from fedtune.config import Recipe


def check_rules(recipe: Recipe) -> None:
    """Every table's own conflicts, in the order of the tables, and what stands between two of them."""
    for table in tables_of(recipe):
        for found, expected, do in table.conflicts(recipe):
            raise FedtuneError("C104", found, expected, do)
    chain = build(recipe.chain)
    check_single_answers(recipe.aggregate, chain)
    check_moves(recipe, chain)
    check_together(recipe, chain)


def check_together(recipe: Recipe, chain: Chain) -> None:
    """Under masks a client's answer is made with its secrets, and so by itself."""
    if chain.hides and recipe.method.together > 1:
        raise FedtuneError(
            "C104",
            f"method.train.together = {recipe.method.together} with '{chain.hides}' in the chain",
            "clients that answer one by one",
            "set method.train.together = 1",
        )


def unseen_behind(chain: Chain) -> str:
    """The step behind which no single answer is seen; "" where there is none."""
    return next((step.name for step in chain.steps if step.undone == "sum" or step.hides), "")


def check_single_answers(rule: Rule, chain: Chain) -> None:
    """A rule that reads single answers cannot stand beside a step that only the sum undoes, such as a
    mask."""
    late = unseen_behind(chain)
    if late and not rule.linear:
        known = ", ".join(sorted(tag for tag, other in RULES.items() if other.linear))
        found = (
            f"aggregate.rule = '{rule.rule}', which reads single answers, beside '{late}', which hides them"
        )
        raise FedtuneError(
            "C104",
            found,
            f"a rule that needs the sum only: {known}",
            f"change aggregate.rule, or remove '{late}' from [[chain]]",
        )


def check_moves(recipe: Recipe, chain: Chain) -> None:
    """How far one answer moves the state is not seen behind a step that only the sum undoes."""
    late = unseen_behind(chain)
    asked = {"limits.clip": recipe.limits.clip, "watch.influence": recipe.watch.influence}
    for setting in (name for name, wanted in asked.items() if late and wanted):
        raise FedtuneError(
            "C104",
            f"{setting}, which looks at single answers, beside '{late}', which hides them",
            "single answers, or a bound that each site applies itself (clip of step 'ring')",
            f"remove {setting}, or '{late}' from [[chain]]",
        )


def tables_of(settings: Settings) -> Iterator[Settings]:
    """A settings object and all tables inside it."""
    yield settings
    for name in type(settings).model_fields:
        value = getattr(settings, name)
        for below in value if isinstance(value, tuple) else (value,):
            if isinstance(below, Settings):
                yield from tables_of(below)

"""From the [aggregate] table to a rule."""

from __future__ import annotations

from typing import Any

from fedtune.aggregate import RULES, Rule
from fedtune.aggregate.settings import AggregateSettings


def build_rule(s: AggregateSettings) -> Rule:
    """The rule with its own settings."""
    own: dict[str, dict[str, Any]] = {
        "flora": {"extra": s.extra},
        "fedex": {"extra": s.extra},
        "hetlora": {"by": s.by},
        "fair": {"lam": s.lam},
        "trimmed": {"trim": s.trim},
        "krum": {"faulty": s.faulty, "chosen": s.chosen},
        "clipped": {"bound": s.bound},
    }
    return RULES[s.rule](**own.get(s.rule, {}))

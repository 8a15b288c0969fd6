"""What a tuned model knows: facts that its run taught, and others that it should know still."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from fedtune.data.sources.facts import ASKED, Fact, Facts
from fedtune.metrics.exact_match import ExactMatch
from fedtune.model.generate import generated, questions
from fedtune.model.likelihood import response_bits
from fedtune.model.tunable import TunableModel
from fedtune.runtime.workspace import Workspace, how_to_encode


def knowledge(workspace: Workspace) -> dict[str, Any]:
    """Each sort of facts, asked in a wording that no row has: how many answers begin with the right words,
    and the mean log-probability in nats of the right answer (up to its end); of updated facts, also what
    became of the answer as it was. A run on other data than the built-in facts is asked for those that are
    known."""
    data = workspace.recipe.data
    taught = isinstance(data, Facts)
    facts = data.facts() if isinstance(data, Facts) else Facts(task="instruct").facts()
    found: dict[str, Any] = {}
    for sort in ("new", "updated", "known") if taught else ("known",):
        some = [fact for fact in facts if fact.sort == sort]
        found[sort] = {"facts": len(some), **answers(workspace, some, [fact.capital for fact in some])}
        if sort == "updated":
            found[sort]["as_before"] = answers(workspace, some, [fact.before for fact in some])
    return found


def answers(workspace: Workspace, facts: Sequence[Fact], wanted: Sequence[str]) -> dict[str, float]:
    """right: share of answers that begin with the wanted words; log_prob: mean over facts."""
    tunable, data = workspace.tunable, workspace.recipe.data
    rows = [
        {"prompt": ASKED.format(fact.country), "response": one}
        for fact, one in zip(facts, wanted, strict=True)
    ]
    how = {**how_to_encode(data), "overlong": "refuse", "alive": workspace.alive}
    bits = response_bits(tunable, rows, how)
    return {
        "right": share_right(tunable, rows, how),
        "log_prob": float(np.mean([np.nansum(one) for one in bits])) * math.log(2),
    }


def share_right(tunable: TunableModel, rows: Sequence[dict[str, str]], how: dict[str, Any]) -> float:
    """Of answers as long as the longest wanted one, greedily."""
    asked = questions(rows, tunable, how["template"], how["system"], how["day"])
    longest = max(len(tunable.base.tokenizer(one.wanted)["input_ids"]) for one in asked)
    plain = ExactMatch().plain
    said = [plain(one).split() for one in generated(tunable, asked, longest + 1)]
    wanted = [plain(one.wanted).split() for one in asked]
    return float(np.mean([one[: len(other)] == other for one, other in zip(said, wanted, strict=True)]))

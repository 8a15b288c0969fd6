"""The recipe's [[metrics]] of an installed state, on the test set."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any

from fedtune.config import method_of
from fedtune.errors import FedtuneError
from fedtune.metrics import metrics_of, share
from fedtune.rng import stream
from fedtune.runtime.workspace import Workspace

if TYPE_CHECKING:
    from fedtune.model.objectives import Objective
    from fedtune.model.score import Score


def figures(workspace: Workspace, got: Score) -> tuple[dict[str, Any], list[dict[str, str]]]:
    """Every metric's figures; "rows" says how many texts were generated for them. And samples of those: what
    was asked, wanted and said."""
    recipe = workspace.recipe
    if got.margins:
        return of_pairs(got, workspace.base.judge), []
    chosen = metrics_of(recipe.metrics, recipe.data.task)
    samples: list[dict[str, str]] = []
    if not chosen:
        return {}, samples
    if recipe.data.task != "instruct":
        labels = workspace.base.labels
        said, wanted = ([labels[n] for n in numbers] for numbers in (got.said, got.wanted))
        more: dict[str, Any] = {}
    else:
        asked, wanted, said = answered(workspace)
        more = {"rows": len(said)}
        each = [
            {"asked": one, "wanted": right, "said": answer}
            for one, right, answer in zip(asked, wanted, said, strict=True)
        ]
        most = recipe.generate.samples
        samples = each[:: max(1, len(each) // max(1, most))][:most]  # from all over the test set
    found: dict[str, Any] = {}
    for metric in chosen:
        found |= metric.measure(said, wanted)
    return found | more, samples


def of_pairs(got: Score, judge: Objective | None) -> dict[str, float]:
    """Of pairs of responses: how many are in their order, with its interval, and the mean margin of rewards;
    where those are relative to a reference, how many the model has in order by itself, too."""
    from fedtune.model.score import half

    found = share("accuracy", [half(one) for one in got.margins])
    if judge and judge.refers:
        found |= share("likelier_per_token", [half(one) for one in got.per_token])
    return found | {"margin": statistics.fmean(got.margins)}


def answered(workspace: Workspace) -> tuple[list[str], list[str], list[str]]:
    """Prompts of the test set, what stands there as their answers, and what the model writes."""
    from fedtune.model.generate import generated, questions

    recipe, rows = workspace.recipe, workspace.federation.test
    if method_of(recipe).capabilities.split is not None:
        raise FedtuneError(
            "M306", f"[[metrics]] of texts with method.type = '{recipe.method.type}'",
            "a model that one process holds", "remove [[metrics]]",
        )  # fmt: skip
    if recipe.generate.rows < len(rows):
        drawn = stream("rows that are answered", recipe.seed).permutation(len(rows))
        rows = [rows[n] for n in sorted(drawn[: recipe.generate.rows].tolist())]
    data = recipe.data
    asked = questions(rows, workspace.tunable, data.template, data.system, data.date)
    if not asked:
        raise FedtuneError("D202", "no rows with a response", "at least one", "look at the test set")
    said = generated(workspace.tunable, asked, recipe.generate.tokens, recipe.generate.batch)
    prompts = [workspace.base.tokenizer.decode(one.tokens, skip_special_tokens=True) for one in asked]
    return prompts, [one.wanted for one in asked], said

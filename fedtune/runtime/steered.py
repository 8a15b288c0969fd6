"""A big model in the place of a run's, steered by it: in scores and in predictions."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from fedtune.data.settings import Source
from fedtune.errors import FedtuneError
from fedtune.runtime.workspace import Workspace, how_to_encode

if TYPE_CHECKING:
    from fedtune.model.collate import Example
    from fedtune.model.encode import Encoded
    from fedtune.model.tunable import TunableModel


SELF = "self"  # in the place of a model: the run's own, by the contrast of its experts


@dataclass(frozen=True)
class Steer:
    """model: a folder or a hub name, or SELF; weight: None is looked for (fedtune.model.steering.matched), or
    the paper's (fedtune.model.contrast)."""

    model: str
    weight: float | None


def asked_to_steer(model: str, weight: float | None) -> Steer | None:
    """Raises C103 for a weight of nothing, and for one that is no number of 0 or more."""
    if weight is not None and not (model and math.isfinite(weight) and weight >= 0):
        raise FedtuneError(
            "C103",
            f"--steer-weight {weight:g}" + ("" if model else " without --steer"),
            "a number of 0 or more beside --steer MODEL",
            "correct it or leave it out",
        )
    return Steer(model, weight) if model else None


def steered_workspace(
    workspace: Workspace, steer: Steer | None, texts: Callable[[], Encoded]
) -> tuple[Workspace, dict[str, Any]]:
    """The workspace with the steered model, and what is told of it; as it was, and nothing, for None.

    texts  on which a weight is looked for
    """
    if steer is None:
        return workspace, {}
    tunable, weight = steered_on(workspace.tunable, workspace.recipe.data, steer, lambda _: texts().examples)
    changed = replace(workspace, tunable=tunable, _fronts={})
    return changed, {"steer": {"model": steer.model, "weight": weight}}


def steered_by_answers(
    tunable: TunableModel, data: Source, steer: Steer, rows: Sequence[Mapping[str, Any] | None]
) -> tuple[TunableModel, float]:
    """A weight is looked for on the first of `rows`, answered by the tuned small model: nobody else's answers
    to them are known."""

    def texts(made: TunableModel) -> Sequence[Example]:
        from fedtune.model.predict import asked_of
        from fedtune.model.steering import TEXTS, own_answers

        how, known = how_to_encode(data, scored=True), [row for row in rows if row is not None]
        talk = {key: how[key] for key in ("template", "system", "day")}
        return own_answers(made, asked_of(tunable, known[:TEXTS], **talk))

    return steered_on(tunable, data, steer, texts)


def steered_on(
    tunable: TunableModel, data: Source, steer: Steer, texts: Callable[[TunableModel], Sequence[Example]]
) -> tuple[TunableModel, float]:
    """Raises D207 for texts that the big model has no room for."""
    from fedtune.model.encode import check_length
    from fedtune.model.steering import matched, steered

    if steer.model == SELF:
        from fedtune.model.contrast import BETA, contrasted

        beta = BETA if steer.weight is None else steer.weight
        return contrasted(tunable, beta), beta
    made = steered(tunable, steer.model, steer.weight or 0.0)
    check_length(made.base, data.max_length)
    if steer.weight is None:
        made.net.weight = matched(made, texts(made))
    weight: float = made.net.weight
    return made, weight

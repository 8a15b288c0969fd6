"""[method.train.objective]: the loss that a client trains by. Its place in this union registers a class, and
nothing else does. Scores are cross entropy whatever a client trains by, but for pairs of responses, which are
scored by the loss that they train by. No torch at import."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from fedtune.model.objectives.asft import Asft, Dft
from fedtune.model.objectives.balanced import Balanced
from fedtune.model.objectives.base import Context, Objective, Predictions
from fedtune.model.objectives.cross_entropy import CrossEntropy
from fedtune.model.objectives.dpo import Dpo
from fedtune.model.objectives.focal import Focal
from fedtune.model.objectives.ipo import Ipo
from fedtune.model.objectives.logit_adjusted import LogitAdjusted
from fedtune.model.objectives.orpo import Orpo
from fedtune.model.objectives.preference import Preference
from fedtune.model.objectives.simpo import Simpo
from fedtune.plugins import extended
from fedtune.settings import classes_by_tag

ObjectiveTable = Annotated[
    CrossEntropy | Focal | Balanced | LogitAdjusted | Dft | Asft | Dpo | Ipo | Orpo | Simpo,
    Field(discriminator="loss"),
]
if not TYPE_CHECKING:
    ObjectiveTable = extended(ObjectiveTable, "loss", "objectives", Objective)

OBJECTIVES: dict[str, type[Objective]] = classes_by_tag(ObjectiveTable, "loss")

__all__ = [
    "OBJECTIVES",
    "Context",
    "CrossEntropy",
    "Objective",
    "ObjectiveTable",
    "Predictions",
    "Preference",
]

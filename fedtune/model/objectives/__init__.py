"""[method.train.objective]: the loss that a client trains by. Its place in this union registers a class, and
nothing else does; scores are cross entropy whatever a client trains by. No torch at import."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from fedtune.model.objectives.asft import Asft, Dft
from fedtune.model.objectives.balanced import Balanced
from fedtune.model.objectives.base import Context, Objective, Predictions
from fedtune.model.objectives.cross_entropy import CrossEntropy
from fedtune.model.objectives.focal import Focal
from fedtune.model.objectives.logit_adjusted import LogitAdjusted
from fedtune.plugins import extended
from fedtune.settings import classes_by_tag

ObjectiveTable = Annotated[
    CrossEntropy | Focal | Balanced | LogitAdjusted | Dft | Asft, Field(discriminator="loss")
]
if not TYPE_CHECKING:
    ObjectiveTable = extended(ObjectiveTable, "loss", "objectives", Objective)

OBJECTIVES: dict[str, type[Objective]] = classes_by_tag(ObjectiveTable, "loss")

__all__ = ["OBJECTIVES", "Context", "CrossEntropy", "Objective", "ObjectiveTable", "Predictions"]

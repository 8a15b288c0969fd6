"""[[method.train.inputs]]: what is altered of what a model reads while it is trained. Its place in this union
registers a class, and nothing else does. No torch at import."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from fedtune.model.input_changes.base import InputChange, Vocabulary
from fedtune.model.input_changes.masked_thought import MaskedThought
from fedtune.model.input_changes.neftune import Neftune
from fedtune.plugins import extended
from fedtune.settings import classes_by_tag

InputChangeTable = Annotated[Neftune | MaskedThought, Field(discriminator="input")]
if not TYPE_CHECKING:
    InputChangeTable = extended(InputChangeTable, "input", "input_changes", InputChange)

INPUT_CHANGES: dict[str, type[InputChange]] = classes_by_tag(InputChangeTable, "input")

__all__ = ["INPUT_CHANGES", "InputChange", "InputChangeTable", "Vocabulary"]

"""[method.distil]: how an emulator learns from the model that it stands for, before the first round. No torch
at import."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from fedtune.model.settings import TrainSettings
from fedtune.settings import Settings
from fedtune.types import TOKEN_TASKS


@dataclass(frozen=True)
class Public:
    """What a model's owner distils with.

    rows  reads the public rows, as fedtune.model.encode.Encoded
    kept  where what was made of them lies from one start to the next; None: nowhere
    """

    rows: Callable[[], Any]
    kept: Path | None


class Distil(Settings):
    """[method.distil]: the emulator's middle blocks learn to say what the model's say, on public rows, once,
    before the first round (Xiao et al. 2023, arXiv:2302.04870, section 3.3)."""

    data: str = ""
    """A file or folder of rows, of the form of [data], that the model's owner has; no client needs it. Empty:
    blocks stay as they are in the model."""
    rows: int = Field(0, ge=0)
    """So many of them at most, drawn with the run's seed; 0 means all."""
    steps: int = Field(200, ge=1)
    """Steps of AdamW."""
    batch: int = Field(8, ge=1)
    """Rows a step."""
    lr: float = Field(3e-4, gt=0, le=100)
    """Learning rate; gradients are clipped to 1."""
    lm: float = Field(0.0, ge=0)
    """causal-lm, instruct: what the emulator's own loss on the rows counts for, beside its error."""

    @property
    def train(self) -> TrainSettings:
        return TrainSettings(
            optimizer="adamw",
            lr=self.lr,
            head_lr=0.0,
            steps=self.steps,
            batch=self.batch,
            clip=1.0,
            autocast="off",
        )

    def conflicts(self, recipe: Any) -> Iterator[tuple[str, str, str]]:
        if self.model_fields_set and not self.data:
            yield (
                "[method.distil] without data",
                "a file of public rows",
                "set data, or remove the table",
            )
        if self.lm and recipe.data.task not in TOKEN_TASKS:
            found = f"method.distil.lm = {self.lm:g} with data.task = '{recipe.data.task}'"
            yield found, f"one of {', '.join(TOKEN_TASKS)}", "remove it"

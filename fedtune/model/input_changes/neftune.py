"""NEFTune: noise on the embeddings of what is trained on."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from fedtune.model.input_changes.base import InputChange


class Neftune(InputChange):
    """input = "neftune": to every number of an embedding, uniform noise from -1 to 1 times alpha / sqrt(L d),
    where L counts the example's own tokens and d the embedding's numbers (Jain et al. 2023, arXiv:2310.05914,
    algorithm 1)."""

    input: Literal["neftune"] = "neftune"
    is_noise: ClassVar[bool] = True
    alpha: float = Field(5.0, ge=0)
    """Size of the noise; 0 is none. The paper takes 5 to 15."""

    @property
    def idle(self) -> bool:
        return not self.alpha

    def noise(self, tokens: int, width: int, draw: np.random.Generator) -> np.ndarray:
        even = draw.random((tokens, width), np.float32) * 2 - 1
        return even * np.float32(self.alpha / math.sqrt(tokens * width))

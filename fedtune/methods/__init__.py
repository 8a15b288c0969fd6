"""One file a method, both halves in it; a new method is one file and two lines here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from pydantic import Field

from fedtune.aggregate import Rule
from fedtune.methods.fedkseed import FedKSeed
from fedtune.methods.fedkseed_settings import FedKSeedSettings
from fedtune.methods.fedpeft import FedPEFT, FedPEFTSettings
from fedtune.methods.sfprompt import SFPrompt
from fedtune.methods.sfprompt_settings import SFPromptSettings
from fedtune.types import Method

MethodSettings = Annotated[FedPEFTSettings | FedKSeedSettings | SFPromptSettings, Field(discriminator="type")]
METHODS: dict[str, Callable[[Any, int, Rule | None], Method]] = {
    "fedpeft": FedPEFT,
    "fedkseed": lambda settings, rounds, aggregate: FedKSeed(settings, rounds),  # whole numbers have one mean
    "sfprompt": lambda settings, rounds, aggregate: SFPrompt(settings, rounds),
}


def build(settings: MethodSettings, rounds: int, aggregate: Rule | None = None) -> Method:
    """The method that a recipe's [method] and [aggregate] tables describe, for a run of so many rounds."""
    return METHODS[settings.type](settings, rounds, aggregate)


__all__ = ["METHODS", "FedPEFTSettings", "MethodSettings", "build"]

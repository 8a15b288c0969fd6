"""One file a method, both halves in it; a new method is one file and one line here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fedtune.methods.fedpeft import FedPEFT, FedPEFTSettings
from fedtune.types import Method

MethodSettings = FedPEFTSettings  # a union with `type` as discriminator, once there are two
METHODS: dict[str, Callable[[Any, int], Method]] = {"fedpeft": FedPEFT}


def build(settings: MethodSettings, rounds: int) -> Method:
    """The method that a recipe's [method] table describes, for a run of so many rounds."""
    return METHODS[settings.type](settings, rounds)

"""One file a method, both halves in it; a new method is one file and one line here."""

from __future__ import annotations

from fedtune.methods.fedpeft import FedPEFT, FedPEFTSettings
from fedtune.types import Method

MethodSettings = FedPEFTSettings


def build(settings: MethodSettings, rounds: int) -> Method:
    """The method that a recipe's [method] table describes, for a run of so many rounds."""
    return FedPEFT(settings, rounds)

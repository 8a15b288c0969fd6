"""One file a method, both halves in it. A method is registered by its table's place in `MethodSettings`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from fedtune.methods.experts import ExpertsTable
from fedtune.methods.fedkseed import FedKSeedTable
from fedtune.methods.fedpeft import FedPEFTTable
from fedtune.methods.interface import Capabilities, Costs, Facts, Method, MethodTable, Together, Verb, Work
from fedtune.methods.ltsft import LTSFTTable
from fedtune.methods.offsite import OffsiteTable
from fedtune.methods.sfprompt import SFPromptTable
from fedtune.plugins import extended
from fedtune.settings import classes_by_tag

MethodSettings = Annotated[
    FedPEFTTable | FedKSeedTable | SFPromptTable | ExpertsTable | OffsiteTable | LTSFTTable,
    Field(discriminator="type"),
]
if not TYPE_CHECKING:
    MethodSettings = extended(MethodSettings, "type", "methods", MethodTable)
METHODS: dict[str, type[MethodTable]] = classes_by_tag(MethodSettings, "type")

__all__ = [
    "METHODS",
    "Capabilities",
    "Costs",
    "Facts",
    "FedPEFTTable",
    "Method",
    "MethodSettings",
    "MethodTable",
    "Together",
    "Verb",
    "Work",
]

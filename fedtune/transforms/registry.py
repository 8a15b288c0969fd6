"""Every step that a recipe's [[chain]] can name: its settings and what builds it. The union of these classes
is the registry."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from fedtune.plugins import extended
from fedtune.schema import Schema
from fedtune.settings import classes_by_tag
from fedtune.transforms.auto import AutoSettings
from fedtune.transforms.base import Chain, StepSettings
from fedtune.transforms.dither import DitherSettings
from fedtune.transforms.mask import MaskSettings
from fedtune.transforms.private import PrivateSettings
from fedtune.transforms.quantize import DeadzoneSettings, QuantizeSettings, SignSettings
from fedtune.transforms.ring import RingSettings
from fedtune.transforms.sparsify import TernarySettings, TopkSettings

ChainStep = Annotated[
    QuantizeSettings
    | DitherSettings
    | SignSettings
    | DeadzoneSettings
    | TernarySettings
    | TopkSettings
    | AutoSettings
    | RingSettings
    | MaskSettings
    | PrivateSettings,
    Field(discriminator="step"),
]
if not TYPE_CHECKING:
    ChainStep = extended(ChainStep, "step", "steps", StepSettings)

STEPS: dict[str, type[StepSettings]] = classes_by_tag(ChainStep, "step")


def build(steps: Sequence[ChainStep]) -> Chain:
    """The chain that a recipe's [[chain]] tables describe; a mask gets a ring before it where no step makes
    ring numbers. Raises C104 for an order that could not be undone."""
    made = [settings.build() for settings in steps]
    lone = [n for n, step in enumerate(steps) if isinstance(step, MaskSettings)]
    if lone and not any(step.gives == "ring" for step in made[: lone[0]]):
        made.insert(lone[0], RingSettings().build())
    return Chain(made)


def bits_per_parameter(chain: Sequence[ChainStep] | Chain, schema: Schema) -> float:
    """Estimated bits a parameter up, headers left out; 32 without steps."""
    bits = 32.0
    for step in (chain if isinstance(chain, Chain) else build(chain)).steps:
        bits = step.bits(schema, bits)
    return bits

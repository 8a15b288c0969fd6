"""Every step that a recipe's [[chain]] can name: its settings and what builds it. A new step is one line here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any

from pydantic import Field

from fedtune.schema import Schema
from fedtune.settings import Settings
from fedtune.transforms.auto import Auto, AutoSettings
from fedtune.transforms.base import Chain, Transform
from fedtune.transforms.dither import Dither, DitherSettings
from fedtune.transforms.quantize import DeadzoneSettings, QuantizeSettings, SignSettings, deadzone, quantize, sign
from fedtune.transforms.sparsify import TernarySettings, TopkSettings, ternary, topk

ChainStep = Annotated[
    QuantizeSettings | DitherSettings | SignSettings | DeadzoneSettings | TernarySettings | TopkSettings | AutoSettings,
    Field(discriminator="step"),
]

STEPS: dict[str, tuple[type[Settings], Callable[[Any], Transform]]] = {
    "quantize": (QuantizeSettings, quantize),
    "dither": (DitherSettings, Dither),
    "sign": (SignSettings, sign),
    "deadzone": (DeadzoneSettings, deadzone),
    "ternary": (TernarySettings, ternary),
    "topk": (TopkSettings, topk),
    "auto": (AutoSettings, Auto),
}


def build(steps: Sequence[ChainStep]) -> Chain:
    """The chain that a recipe's [[chain]] tables describe. Raises C104 for an order that could not be undone."""
    return Chain([STEPS[settings.step][1](settings) for settings in steps])


def bits_per_parameter(chain: Sequence[ChainStep] | Chain, schema: Schema) -> float:
    """Estimated bits a parameter up, headers left out; 32 without steps."""
    bits = 32.0
    for step in (chain if isinstance(chain, Chain) else build(chain)).steps:
        bits = step.bits(schema, bits)
    return bits

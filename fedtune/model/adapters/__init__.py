"""Kinds of adapters, one file each: settings, flags and code. A kind is registered by its place in
`AdapterSettings`. No torch at import."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from fedtune.model.adapters.base import Adapter, LayerAdapter, PromptAdapter
from fedtune.model.adapters.bias import Bias
from fedtune.model.adapters.bottleneck import Bottleneck
from fedtune.model.adapters.deft import Deft
from fedtune.model.adapters.dsee import Dsee
from fedtune.model.adapters.full import Full
from fedtune.model.adapters.head import Head
from fedtune.model.adapters.ia3 import IA3
from fedtune.model.adapters.layernorm import LayerNorm
from fedtune.model.adapters.lift import Lift
from fedtune.model.adapters.lora import Lora
from fedtune.model.adapters.p_tuning import PTuning
from fedtune.model.adapters.prefix import Prefix
from fedtune.model.adapters.prompt import Prompt
from fedtune.model.adapters.shira import Shira
from fedtune.plugins import extended
from fedtune.settings import classes_by_tag

AdapterSettings = Annotated[
    Lora
    | Bias
    | Bottleneck
    | Prompt
    | Prefix
    | PTuning
    | IA3
    | LayerNorm
    | Shira
    | Lift
    | Dsee
    | Deft
    | Head
    | Full,
    Field(discriminator="kind"),
]
if not TYPE_CHECKING:
    AdapterSettings = extended(AdapterSettings, "kind", "adapters", Adapter)
ADAPTERS: dict[str, type[Adapter]] = classes_by_tag(AdapterSettings, "kind")


def read_adapter(table: Mapping[str, Any]) -> Adapter:
    """The adapter that a file of this or an earlier version describes; version 0.1 wrote the keys of all
    kinds. Raises KeyError, ValueError."""
    cls = ADAPTERS[table["kind"]]
    return cls.model_validate_json(
        json.dumps({key: value for key, value in table.items() if key in cls.model_fields})
    )


__all__ = [
    "ADAPTERS",
    "Adapter",
    "AdapterSettings",
    "Full",
    "LayerAdapter",
    "Lora",
    "PromptAdapter",
    "read_adapter",
]

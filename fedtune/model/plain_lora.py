"""Which LoRA adapters are plain: what they add to the untouched base is scale (B A x + b), so that they can
be merged as products.

Every setting of an adapter_config.json is decided here, a later peft's too: read, of no effect on a trained
adapter, off, or refused by name.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peft

from fedtune.errors import FedtuneError

STARTS = (
    True,
    False,
    "gaussian",
    "eva",
    "orthogonal",
    "mica",
)  # they leave the base alone; pissa, olora, corda, loftq and lora_ga change it
READ = {
    *(
        "peft_type",
        "task_type",
        "base_model_name_or_path",
        "revision",
        "r",
        "lora_alpha",
        "rank_pattern",
        "alpha_pattern",
        "use_rslora",
    ),
    *(
        "lora_bias",
        "init_lora_weights",
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "modules_to_save",
    ),
    *("bias", "trainable_token_indices", "ensure_weight_tying", "layer_replication", "use_dora"),
}
# Of training or of loading only. fan_in_fan_out: peft asks the layer itself. The configs of a start act
# through init_lora_weights;
# VeLoRA changes the backward pass alone.
HARMLESS = {
    *(
        "auto_mapping",
        "peft_version",
        "inference_mode",
        "lora_dropout",
        "fan_in_fan_out",
        "megatron_core",
        "runtime_config",
    ),
    *("qalora_group_size", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "velora_config"),
}
TENSOR = re.compile(
    r"\.(lora_[AB]\.weight|lora_B\.bias|lora_embedding_[AB])$"
)  # what plain LoRA keeps; others are a variant's own


def check_plain(config: Mapping[str, Any], names: list[str], place: Path) -> None:
    """Raises M306 for other adapters than LoRA, and for LoRA that adds anything else than its products to the
    base."""
    if config.get("peft_type") != "LORA":
        raise FedtuneError(
            "M306", f"an adapter of type {config.get('peft_type')} in '{place}'", "LORA", "leave it out"
        )
    if config.get("use_dora"):
        do = "make plain LoRA of it with peft.convert_to_lora, or leave it out"
        raise FedtuneError(
            "M306",
            f"DoRA in '{place}', which rescales the base's own weights",
            "pairs whose product is added to the base",
            do,
        )
    odd = [
        name
        for name, value in sorted(config.items())
        if name not in READ | HARMLESS and value and value != default_of(name)
    ]
    if config.get("init_lora_weights", True) not in STARTS:
        odd.append(f"init_lora_weights = {config['init_lora_weights']}")
    odd += [f"the tensor '{name}'" for name in names if ".lora_" in name and not TENSOR.search(name)]
    if config.get("ensure_weight_tying") and any(".lora_embedding_" in name for name in names):
        odd.append("ensure_weight_tying over an adapted embedding")
    if odd:
        expected = "pairs whose product is added to the untouched base"
        raise FedtuneError(
            "M306", f"LoRA with {odd[0]} in '{place}'", expected, "convert it with peft, or leave it out"
        )


@functools.cache
def defaults() -> dict[str, Any]:
    return {one.name: one.default for one in dataclasses.fields(peft.LoraConfig)}


def default_of(name: str) -> Any:
    """The value of a setting that is as good as none; None for a setting that this peft does not know."""
    return defaults().get(name)

"""Adapters as stock PEFT makes them, for tests of merges."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import torch
from transformers import AutoModelForCausalLM

from fedtune.cli import main

Deltas = dict[str, torch.Tensor]
CONFIGS: list[dict[str, Any]] = [
    {"r": 4, "lora_alpha": 8},
    {
        "r": 2,
        "lora_alpha": 8,
        "rank_pattern": {"q_proj": 3},
        "alpha_pattern": {"layers.1.self_attn.q_proj": 6},
    },
    {"r": 3, "lora_alpha": 6, "use_rslora": True},
]


def stock(model: Path, folder: Path, seed: int, **config: Any) -> Path:
    """An adapter of random factors, as peft saves it."""
    wanted = {"target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"} | config
    net = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(model), peft.LoraConfig(**wanted))
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in net.named_parameters():
            if "lora_" in name:
                value.copy_(torch.randn(value.shape, generator=draw) / 4)
    net.save_pretrained(str(folder))
    return folder


def deltas(model: Path, folder: Path) -> Deltas:
    """What stock peft adds to every adapted weight."""
    net = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), str(folder))
    layers = {
        name: module for name, module in net.named_modules() if isinstance(module, peft.tuners.lora.LoraLayer)
    }
    return {name: module.get_delta_weight("default").detach().double() for name, module in layers.items()}


def apart(found: Deltas, wanted: Deltas) -> float:
    assert found.keys() == wanted.keys()
    return max(float((found[name] - wanted[name]).norm() / wanted[name].norm()) for name in wanted)


def merge(shelf: list[Path], to: Path, *more: str) -> int:
    return main(["merge", *map(str, shelf), "--to", str(to), *more])

"""Every adapter kind on every class of model that supports it; the rest must be refused with M306."""

from __future__ import annotations

import random
from typing import Any

from tests.marks import mostly_thorough

MODELS = ("causal", "decoder", "encoder", "images")
VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {"kind": "lora"},
    "rslora": {"kind": "lora", "rslora": True, "targets": ("all-linear",)},
    "dora": {"kind": "lora", "dora": True},
    "bias": {"kind": "bias"},
    "adapter": {"kind": "adapter"},
    "adapter each": {"kind": "adapter", "shared": False},
    "prompt": {"kind": "prompt", "tokens": 4},
    "prompt deep": {"kind": "prompt", "tokens": 4, "deep": True},
    "prefix": {"kind": "prefix", "tokens": 4},
    "p-tuning": {"kind": "p-tuning", "tokens": 4},
    "ia3": {"kind": "ia3"},
    "layernorm": {"kind": "layernorm"},
    "shira": {"kind": "shira"},
    "shira magnitude": {"kind": "shira", "support": "magnitude"},
    "lift": {"kind": "lift", "filter_rank": 4},
    "deft": {"kind": "deft", "rank": 2},
    "dsee": {"kind": "dsee", "share": 0.05, "rank": 2},
    "head": {"kind": "head"},
    "full": {"kind": "full"},
}
REFUSED = {
    ("causal", "bias"), ("decoder", "bias"),  # a Llama has no biases
    ("encoder", "prefix"), ("images", "prefix"),  # encoders take no cache
    ("decoder", "p-tuning"), ("images", "p-tuning"),
}  # fmt: skip
PAIRS = [(model, variant) for model in MODELS for variant in VARIANTS if (model, variant) not in REFUSED]
EVERY_TIME = {variant: (model, variant) for model, variant in random.Random(1).sample(PAIRS, len(PAIRS))}
ALL = mostly_thorough(PAIRS, EVERY_TIME.values())  # one model of each kind every time

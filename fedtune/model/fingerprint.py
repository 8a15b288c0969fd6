"""What a base model is known by, whatever type its weights are held in here."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from typing import Any

import torch

HALF = (torch.bfloat16, torch.float16)


def digest(*groups: Mapping[str, torch.Tensor], besides: Collection[str], as_float32: bool) -> Any:
    """SHA-256, to be gone on with, over names, types, shapes and bytes of each group's tensors in the order
    of their names, without the names in `besides`.

    as_float32  tensors of half precision count as the float32 values that they are
    """
    total = hashlib.sha256()
    for group in groups:
        for name in sorted(group.keys() - besides):
            value = group[name].detach().cpu().contiguous()
            if as_float32 and value.dtype in HALF:
                value = value.float()
            total.update(json.dumps([name, str(value.dtype), list(value.shape)]).encode())
            total.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return total


def tokenizer_text(tokenizer: Any) -> str:
    """What the tokenizer is, as canonical JSON: without the padding and truncation state that calls leave
    behind."""
    if getattr(tokenizer, "backend_tokenizer", None) is not None:
        known = json.loads(tokenizer.backend_tokenizer.to_str())
        known["truncation"] = known["padding"] = None
        known["chat_template"] = tokenizer.chat_template
    elif hasattr(tokenizer, "get_vocab"):
        known = {"vocabulary": tokenizer.get_vocab(), "chat_template": tokenizer.chat_template}
    else:
        known = {
            name: value
            for name, value in tokenizer.to_dict().items()
            if name not in ("transformers_version", "_processor_class")
        }
    return json.dumps(known, sort_keys=True, default=str)


def tokenizer_parts(tokenizer: Any) -> Any:
    """How a fast tokenizer finds its tokens in a text; None of a slow one. What it puts around texts, and its
    chat template, are no part of that."""
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        return None
    known = json.loads(tokenizer.backend_tokenizer.to_str())
    return {name: known[name] for name in ("normalizer", "pre_tokenizer", "model")}

"""Models of real shapes with random values, made on the device; rows of random tokens; a clock and a memory
watch."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from fedtune.model.base import Base
from fedtune.model.collate import collate_text
from fedtune.model.encode import Encoded

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": 500,
    },
    "0.6B": {
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
    },
    "1B": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 128256,
    },
    "3.2B": {
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
}


def net_of(size: str, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Any:
    with torch.device(device):
        config = LlamaConfig(tie_word_embeddings=True, pad_token_id=0, **SHAPES[size])
        return LlamaForCausalLM._from_config(config, dtype=dtype).requires_grad_(False).eval()


def seconds(work: Callable[[], object], device: torch.device, turns: int = 10) -> float:
    """The median of some turns, after one that is not counted."""
    taken = []
    for _ in range(turns + 1):
        wait(device)
        start = time.perf_counter()
        work()
        wait(device)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[1:])


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def base_of(size: str, device: torch.device) -> Base:
    return Base(
        net_of(size, device), None, "causal-lm", (), device, size, None, frozenset(), needs_mask=False
    )


def data_of(base: Base, rows: int, tokens: int, seed: int = 3) -> Encoded:
    """So many rows of so many tokens, all of which carry loss."""
    draw = np.random.default_rng(seed)
    ids = [draw.integers(1, base.net.config.vocab_size, tokens).astype(np.int32) for _ in range(rows)]
    examples = [{"input_ids": row, "labels": row} for row in ids]
    return Encoded(examples, lambda at: collate_text([examples[i] for i in at], 0), rows * (tokens - 1))


def peak(work: Callable[[], object], device: torch.device) -> int:
    """Bytes of the device's memory that tensors took at once, with those that were there before; 0 on a CPU."""
    if device.type != "cuda":
        work()
        return 0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    work()
    return int(torch.cuda.max_memory_allocated(device))


class Operations(TorchDispatchMode):  # type: ignore[misc]  # torch is untyped here
    """Counts what torch is asked to do, views included: on a GPU each of the rest is a launch or more."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return function(*args, **(kwargs or {}))


def operations(work: Callable[[], object]) -> int:
    with Operations() as watch:
        work()
    return watch.count


def apart(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> float:
    """Length of the difference of two lists of tensors, over that of the second."""
    wrong = sum(float((a.double() - b.double()).square().sum()) for a, b in zip(ours, theirs, strict=True))
    return (wrong / sum(float(b.double().square().sum()) for b in theirs)) ** 0.5

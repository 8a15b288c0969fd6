"""Philox4x32-10 in torch integer operations, for any device that has int64: the words of philox.py."""

from __future__ import annotations

import torch

from fedtune.zeroth.philox import LOW, M0, M1, ROUNDS, W0, W1


def words(key: int, family: int, stream: int, first: int, count: int, device: torch.device) -> torch.Tensor:
    """As philox.words: int64 (count,), each below 2**32. Products wrap around in int64, which leaves the 64
    bits that are wanted."""
    block = torch.arange(first // 4, -(-(first + count) // 4), dtype=torch.int64, device=device)
    c0, c1 = block & LOW, block >> 32
    c2, c3 = torch.full_like(block, stream), torch.full_like(block, family)
    k0, k1 = key & LOW, key >> 32
    for _ in range(ROUNDS):
        p0, p1 = c0 * M0, c2 * M1
        c0, c1, c2, c3 = (p1 >> 32 & LOW) ^ c1 ^ k0, p1 & LOW, (p0 >> 32 & LOW) ^ c3 ^ k1, p0 & LOW
        k0, k1 = (k0 + W0) & LOW, (k1 + W1) & LOW
    return torch.stack([c0, c1, c2, c3], -1).reshape(-1)[first % 4 :][:count]

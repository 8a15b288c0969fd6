"""Torch's own generator, for what draws from it and cannot be given another: dropout, and the heads that
transformers makes."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

_TURN = threading.RLock()


@contextmanager
def own_draws(seed: int | None = None, devices: Sequence[torch.device] = ()) -> Iterator[None]:
    """The generator of the CPU (and of `devices`), seeded, and put back afterwards. There is one a process,
    so threads take turns."""
    with _TURN, torch.random.fork_rng(devices=list(devices)):
        if seed is not None:
            torch.manual_seed(seed)
        yield

"""Torch's own generator, for what draws from it and cannot be given another: dropout, and the heads that
transformers makes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_TURN = threading.RLock()


@contextmanager
def own_draws(seed: int | None = None, device: torch.device | None = None) -> Iterator[None]:
    """The generator of the CPU (and of a GPU as `device`), seeded, and put back afterwards. There is one a
    process, so threads take turns."""
    devices = [device] if device and device.type == "cuda" else []
    with _TURN, torch.random.fork_rng(devices=devices):
        if seed is not None:
            # torch.manual_seed seeds every back end and, where there is none, keeps a traceback of each call
            torch.default_generator.manual_seed(seed)
            for one in devices:
                with torch.cuda.device(one):
                    torch.cuda.manual_seed(seed)
        yield

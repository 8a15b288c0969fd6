"""A network that answers without dropout for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def in_eval_mode(net: nn.Module) -> Iterator[None]:
    """In eval mode meanwhile, whatever happens, and then as it was."""
    training = net.training
    net.eval()
    try:
        yield
    finally:
        net.train(training)

"""Whom a router asks: what events and reports tell of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass
class Health:
    """What a router did: shares of all tokens and layers by expert, what they would be if all that live in a
    layer were used alike, and how decided it was."""

    shares: np.ndarray
    even: np.ndarray
    entropy: float = 0.0
    tokens: float = 0.0

    def report(self, names: Sequence[str]) -> dict[str, Any]:
        part = self.shares / max(self.tokens, 1.0)
        return {
            "shares": dict(zip(names, map(float, part), strict=True)),
            "entropy": self.entropy / max(self.tokens, 1.0),
            "starved": [name for name, few in zip(names, self.shares < 0.1 * self.even, strict=True) if few],
            "collapsed": len(names) > 1 and bool(part.max() > 0.95),
        }

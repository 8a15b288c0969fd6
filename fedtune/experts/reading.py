"""Who is asked is decided before any expert speaks: a text first goes through the general expert alone, and
all layers' scores are added up.

The gate's features are then the same whatever it decides, at every layer it knows what all layers have seen,
and what was fitted on sums (discriminant.py) is what it meets. It costs a second pass, which has a cache of
its own.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fedtune.experts.gates import Gate
from fedtune.model.prefix_sums import leveled


@dataclass
class Reading:
    """Of the texts that a network is at: `scores` (batch, tokens, experts) of the tokens of this pass; what
    a prefix adds to those that follow."""

    busy: bool = False  # the pass ahead is under way: experts are silent
    scores: Any = None
    cache: Any = None
    summed: Any = 0.0  # of the prefix: scores, and how many tokens they are of
    tokens: Any = 0.0

    def ahead(self, net: nn.Module, arguments: Any, named: dict[str, Any], keeps: bool) -> None:
        """The same tokens through the network without experts. `keeps`: more of the same texts may follow."""
        mine = {name: value for name, value in named.items() if name != "labels"}
        if (past := named.get("past_key_values")) is not None:
            self.cache = deepcopy(past) if self.cache is None else self.cache
            mine["past_key_values"] = self.cache
        self.busy, self.scores = True, None
        try:
            with torch.no_grad():
                said = net(*arguments, **mine)
        finally:
            self.busy = False
        if keeps and self.cache is None and isinstance(said, dict):
            self.cache = said.get("past_key_values")

    def see(self, gate: Gate, x: torch.Tensor) -> None:
        """What comes into a layer adds its scores; a layer behind all tokens, such as a pooler, has none."""
        if x.dim() == 3 and (self.scores is None or self.scores.shape[:2] == x.shape[:2]):
            scores = gate(leveled(x))
            self.scores = scores if self.scores is None else self.scores + scores

    def at(self, x: torch.Tensor) -> torch.Tensor:
        """Scores of what comes into a layer: of each token; of the whole text, where it has no tokens."""
        same = x.dim() == 3 and x.shape[1] == self.scores.shape[1]
        found: torch.Tensor = self.scores if same else self.scores[:, -1:]
        return found if x.dim() == 3 else found[:, 0]

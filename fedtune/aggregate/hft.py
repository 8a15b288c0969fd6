"""HFT: a drawn half of the matrices is trained and averaged in a round, the same half everywhere (Hui et al.
2024, arXiv:2404.18466). Up: that half, and what is no matrix of a block.

Their stages each draw anew; here the second of two rounds takes what the first one left, so that two rounds
train everything once. Half of a block's attention, half of the rest; where a number is odd, blocks take turns
with the greater half.
"""

from __future__ import annotations

import re
from typing import Literal

from fedtune.aggregate.rule import Names, Rule
from fedtune.errors import FedtuneError
from fedtune.rng import stream

BLOCK = re.compile(r"^((?:[^.]+\.)*?)(\d+)\.(.+)$")  # what lies before a block's number, the number, the rest
TENSOR = re.compile(r"\.(?:(?:lora|ia3|shira|supertuning|deft)_.*|weight|bias)$")
NORM = re.compile(r"norm|\bln_?\w*$", re.I)
ATTENTION = re.compile(r"attn|attention", re.I)


class HFT(Rule):
    """rule = "hft": a half of the matrices by turns, drawn for each two rounds."""

    rule: Literal["hft"] = "hft"
    seed: int = 0
    """Another number, other halves; the run's own seed has no part in it."""

    def trains(self, names: Names, number: int) -> frozenset[str]:
        """Raises M306 where nothing is a matrix in a numbered block."""
        held = frozenset(names)
        module_of = {name: module for name in held if (module := matrix(name))}
        if not module_of:
            raise FedtuneError(
                "M306",
                f"aggregate.rule = 'hft' with {len(held)} tensors such as '{min(held, default='')}'",
                "an adapter that trains matrices of numbered blocks, such as full or lora",
                "choose another method.adapter.kind or aggregate.rule",
            )
        first = half(set(module_of.values()), self.seed, (number + 1) // 2)
        rests = {module for module in module_of.values() if (module in first) is (number % 2 == 0)}
        return held - {name for name, module in module_of.items() if module in rests}


def matrix(name: str) -> tuple[str, int, str] | None:
    """Stack, block and module that a tensor belongs to; None outside of blocks and for norms.

    >>> matrix("model.layers.3.self_attn.q_proj.lora_A.weight")
    ('model.layers.', 3, 'self_attn.q_proj')
    """
    found = BLOCK.match(name)
    if not found or not TENSOR.search(found[3]):
        return None
    module = TENSOR.sub("", found[3])
    return None if NORM.search(module) else (found[1], int(found[2]), module)


def half(modules: set[tuple[str, int, str]], seed: int, draw: int) -> set[tuple[str, int, str]]:
    """One of the two halves: in each block every other module of a drawn order, going on where the block
    before stopped."""
    chosen = set()
    random = stream("half of the matrices", seed, draw)
    for attention in (True, False):
        turn = int(random.integers(2))
        sort = [one for one in sorted(modules) if bool(ATTENTION.search(one[2])) is attention]
        for block in dict.fromkeys((stack, number) for stack, number, _ in sort):
            own = [one for one in sort if one[:2] == block]
            for place in random.permutation(len(own)).tolist():
                if turn:
                    chosen.add(own[place])
                turn = 1 - turn
    return chosen

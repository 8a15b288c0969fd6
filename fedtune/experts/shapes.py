"""Experts per layer (MoLA, Gao et al. 2024, arXiv:2402.08562): how many live in a block of the network varies
with its depth, of as many in all whatever the shape.

A shape says how many of eight experts each quarter of the depth has, from the input up. Of K experts a block
has that share, rounded so that blocks add up to 5/8 of K times their number; and two at least where there
is no null expert, because one alone would be asked for everything. Blocks take turns: experts differ by one
block at most in how many they have.

>>> counts("inverted", 8, 4, 2), counts("hourglass", 8, 8, 2)
([2, 4, 6, 8], [8, 8, 2, 2, 2, 2, 8, 8])
>>> counts("triangle", 4, 2, 2), counts("diamond", 3, 4, 2)
([3, 2], [2, 2, 2, 2])
>>> in_turns([2, 2, 3], 4)
[(0, 1), (2, 3), (0, 1, 2)]
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Literal

from fedtune.experts.feed_forward import Sizes, blocks

Within = Literal["all", "feed-forward"]
Per = Literal["layer", "block"]
Shape = Literal["whole", "rectangle", "triangle", "inverted", "hourglass", "diamond"]
OF = 8  # experts that a shape's numbers are out of
SHAPES = {
    "rectangle": (5, 5, 5, 5),
    "triangle": (8, 6, 4, 2),
    "inverted": (2, 4, 6, 8),
    "hourglass": (8, 2, 2, 8),
    "diamond": (2, 8, 8, 2),
}


@dataclass(frozen=True)
class Where:
    """living  layer -> the numbers of the experts that have a pair there, ascending
    gated   layers at whose input a gate decides
    """

    living: Mapping[str, tuple[int, ...]]
    gated: tuple[str, ...]

    def of(self, expert: int) -> frozenset[str]:
        """The layers where one of them lives."""
        return frozenset(layer for layer, who in self.living.items() if expert in who)


def where(sizes: Sizes, experts: int, shape: Shape, least: int, within: Within, per: Per) -> Where:
    """Of adapted layers, by the widths of what comes in and goes out. Raises M306 for layers that make up no
    feed-forward blocks, where those are meant."""
    who = living(tuple(sizes), experts, shape, least)
    if within == "all":
        return Where(who, tuple(sizes))
    heads = blocks(sizes)
    gated = tuple(dict.fromkeys(heads.values())) if per == "block" else tuple(heads)
    return Where({layer: who[layer] if layer in heads else () for layer in sizes}, gated)


def living(layers: Sequence[str], experts: int, shape: Shape, least: int) -> dict[str, tuple[int, ...]]:
    """Layer -> the numbers of the experts that live there, ascending: all of them in the shape "whole". What
    is in no block goes with the last one."""
    from fedtune.model.adapters.layers import block_numbers

    if shape == "whole":
        return dict.fromkeys(layers, tuple(range(experts)))
    numbers = block_numbers(f"{layer}." for layer in layers)
    blocks = sorted(set(numbers.values())) or [0]
    who = in_turns(counts(shape, experts, len(blocks), least), experts)
    return {layer: who[blocks.index(numbers.get(f"{layer}.", blocks[-1]))] for layer in layers}


def counts(shape: Shape, experts: int, blocks: int, least: int) -> list[int]:
    """How many experts live in each block: `least` (or all there are) to all. Fractions are carried on to the
    next block, so that neighbours of one share differ by one at most."""
    wanted = [experts / OF * mean_over(SHAPES[shape], n / blocks, (n + 1) / blocks) for n in range(blocks)]
    least = min(least, experts)
    total = max(least * blocks, round(experts * blocks * 5 / OF))
    low, high = 0.0, float(OF)
    for _ in range(60):  # the factor by which bounded shares add up to the total
        middle = (low + high) / 2
        shares = [min(max(middle * share, least), experts) for share in wanted]
        low, high = (middle, high) if sum(shares) < total else (low, middle)
    ends = [0, *(math.floor(end + 0.5 + 1e-9) for end in accumulate(shares))]
    return [end - start for start, end in pairwise(ends)]


def mean_over(quarters: Sequence[int], start: float, end: float) -> float:
    """Of numbers that each hold on a quarter of 0 to 1, the mean from `start` to `end`."""
    parts = [max(0.0, min(end, (n + 1) / 4) - max(start, n / 4)) for n in range(4)]
    return sum(part * number for part, number in zip(parts, quarters, strict=True)) / (end - start)


def in_turns(sizes: Sequence[int], experts: int) -> list[tuple[int, ...]]:
    """So many experts for each block: those that live in the fewest so far, by number."""
    has, who = [0] * experts, list[tuple[int, ...]]()
    for size in sizes:
        chosen = sorted(sorted(range(experts), key=lambda n: (has[n], n))[:size])
        for number in chosen:
            has[number] += 1
        who.append(tuple(chosen))
    return who

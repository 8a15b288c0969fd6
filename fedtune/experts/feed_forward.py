"""Which linear layers of a network are feed-forward blocks: known by their names and widths alone."""

from __future__ import annotations

import re
from collections.abc import Mapping

from fedtune.errors import FedtuneError

Sizes = Mapping[str, tuple[int, int]]  # layer -> width of what comes in, and of what goes out
BLOCK = re.compile(r"^.*?\.\d+\.")


def blocks(sizes: Sizes) -> dict[str, str]:
    """Each layer of a feed-forward block, and the first by name of those that are given what comes into it.
    Such are, of a block of the network, the layers outside its attention, one of which narrows back to the
    width that comes in. Raises M306 where there is none, or where they are something else."""
    inside: dict[str, list[str]] = {}
    for layer in sizes:
        if (found := BLOCK.match(f"{layer}.")) and not re.search("attn|attention", layer, re.IGNORECASE):
            inside.setdefault(found[0], []).append(layer)
    if not inside:
        raise unfit("LoRA on no feed-forward layer")
    heads: dict[str, str] = {}
    for block, layers in inside.items():
        first = [layer for layer in layers if not narrows(sizes[layer])]
        last = [layer for layer in layers if narrows(sizes[layer])]
        if not first or len(last) != 1 or {sizes[layer][0] for layer in first} != {sizes[last[0]][1]}:
            raise unfit(f"LoRA on {', '.join(layers[:4])} of {block.rstrip('.')}")
        heads |= dict.fromkeys(layers, min(first))
    return heads


def narrows(size: tuple[int, int]) -> bool:
    """Of the last layer of a block."""
    return size[0] > size[1]


def unfit(found: str) -> FedtuneError:
    return FedtuneError(
        "M306",
        f"method.experts.within = 'feed-forward' with {found}",
        "blocks of layers that widen and one that narrows back, all adapted",
        "set method.adapter.targets = ['all-linear'], or leave within out",
    )

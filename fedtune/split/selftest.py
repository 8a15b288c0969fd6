"""A card that travels with a part: a seeded input, what the part answered, and the digest of its tensors.

A part of other layers, of another revision, or one whose buffers were not made as for the whole model gives
another answer, and is refused
before any training. The digest tells exactly, where both sides hold the same number type; the answer also
tells when the weights are right and the
computation is not, and of a part at the other end of a wire, whose weights nobody here can read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from fedtune.errors import FedtuneError
from fedtune.rng import stream
from fedtune.split.cut import Role, Side
from fedtune.split.parts import Part

Card = dict[str, Any]
ROWS, TOKENS, VALUES = 2, 8, 64
# Largest relative distance between two honest machines: room for float32 sums in another order, and for the
# 11 or 8 bits of half precision
# over many blocks. Two blocks swapped in a tiny model are farther away than the widest of these.
REACH = {torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}


def make(part: Part, seed: int = 0) -> Card:
    """The card of all parts that are held, as plain numbers for JSON. Made before anything is trained, and
    without adapters."""
    net = part.net
    card: Card = {
        "model": type(net).__name__,
        "type": net.config.model_type,
        "k": part.cut.k,
        "m": part.cut.m,
        "blocks": part.blocks,
        "width": part.width,
        "seed": seed,
        "dtype": str(part.dtype).removeprefix("torch."),
    }
    for role in sorted(part.holds):
        output = ANSWER[role](part, card)
        card[role] = {"sha256": digest(part, role), **summary(output, card, role)}
    return card


def check(part: Part, card: Mapping[str, Any]) -> None:
    """Raise S702 unless every part that is held here is the one on the card. Parts that the card does not
    know are not looked at."""
    own = {
        "model": type(part.net).__name__,
        "k": part.cut.k,
        "m": part.cut.m,
        "blocks": part.blocks,
        "width": part.width,
    }
    for name, value in own.items():
        if card.get(name) != value:
            raise wrong(f"a part with {name} = {value}", f"{name} = {card.get(name)}")
    same_type = card.get("dtype") == str(part.dtype).removeprefix("torch.")
    for role in sorted(part.holds):
        known = card.get(role)
        if not known:
            continue
        verify(card, role, ANSWER[role](part, card), part.dtype)
        if same_type and known["sha256"] != digest(part, role):
            raise wrong(
                f"a {role} whose tensors have digest {digest(part, role)[:12]}",
                f"{known['sha256'][:12]} (these are another revision, or trained weights)",
            )


def verify(card: Mapping[str, Any], role: Role, output: torch.Tensor, dtype: torch.dtype) -> None:
    """Raise S702 unless an answer to the card's input is that on the card, up to rounding in `dtype`. For a
    body behind a wire: see `canary`."""
    known, got = card[role], summary(output, card, role)
    if got["shape"] != known["shape"]:
        raise wrong(f"a {role} that answers with shape {got['shape']}", f"{known['shape']}")
    a, b = np.asarray(got["values"]), np.asarray(known["values"])
    away = float(np.linalg.norm(a - b) / max(float(np.linalg.norm(b)), 1e-30))
    reach = max(REACH.get(dtype, 1e-1), REACH.get(getattr(torch, str(card["dtype"]), torch.float32), 1e-1))
    if not away <= reach:  # a NaN is no answer either
        raise wrong(
            f"a {role} whose answer to the self-test is {away:.1%} off",
            f"at most {reach:.1%} (these are other layers, or another revision)",
        )


def canary(
    card: Mapping[str, Any], dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> tuple[torch.Tensor, Side]:
    """The body's input of the card, for a client that wants to know what runs at the other end."""
    return noise(card, "body").to(device, dtype), Side()


def digest(part: Part, role: Role) -> str:
    """SHA-256 over names, types, shapes and bytes of one part's tensors, as hex; fresh ones, which differ
    between machines, are left out."""
    total = hashlib.sha256()
    for name, value in sorted(part.parameters(role).items()):
        if name in part.fresh:
            continue
        data = value.detach().cpu().contiguous()
        total.update(json.dumps([name, str(data.dtype), list(data.shape)]).encode())
        total.update(data.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def head_answer(part: Part, card: Mapping[str, Any]) -> torch.Tensor:
    draw, config = stream("split self-test head", card["seed"]), part.net.config
    if part.anatomy.image:
        size = (
            config.image_size
            if isinstance(config.image_size, (list, tuple))
            else (config.image_size, config.image_size)
        )
        inputs = {
            "pixel_values": torch.from_numpy(
                draw.standard_normal((ROWS, config.num_channels, *size), dtype=np.float32)
            )
        }
    else:
        ids = draw.integers(0, config.get_text_config().vocab_size, (ROWS, TOKENS))
        inputs = {
            "input_ids": torch.from_numpy(ids),
            "attention_mask": torch.ones(ROWS, TOKENS, dtype=torch.long),
        }
    return part.head({name: value.to(part.device) for name, value in inputs.items()})[0]


def body_answer(part: Part, card: Mapping[str, Any]) -> torch.Tensor:
    hidden, side = canary(card, part.dtype, part.device)
    return part.body(hidden, side)


def tail_answer(part: Part, card: Mapping[str, Any]) -> torch.Tensor:
    """Without the task head, which may be fresh."""
    return part.backbone_tail(noise(card, "tail").to(part.device, part.dtype), Side())


ANSWER: dict[str, Callable[[Part, Mapping[str, Any]], torch.Tensor]] = {
    "head": head_answer,
    "body": body_answer,
    "tail": tail_answer,
}


def noise(card: Mapping[str, Any], role: Role) -> torch.Tensor:
    """Standard normal (2, 8, d) float32."""
    return torch.from_numpy(
        stream(f"split self-test {role}", card["seed"]).standard_normal(
            (ROWS, TOKENS, card["width"]), dtype=np.float32
        )
    )


def summary(output: torch.Tensor, card: Mapping[str, Any], role: Role) -> dict[str, Any]:
    """Shape, and 64 values at seeded places; of a body what it adds to its input, or the residual stream
    would drown the difference."""
    told = output.detach().float().cpu()
    if role == "body" and told.shape == (ROWS, TOKENS, card["width"]):
        told = told - noise(card, role)
    flat = told.reshape(-1).numpy()
    places = stream(f"split self-test places {role}", card["seed"]).integers(0, max(flat.size, 1), VALUES)
    return {"shape": list(output.shape), "values": [float(value) for value in flat[places]]}


def wrong(found: str, expected: str) -> FedtuneError:
    return FedtuneError("S702", found, expected, "give server and clients the same model, revision, k and m")

"""FedKSeed's passes over weights: their bits, and what they cost beside the memory and beside forward passes.

A replay and three moves have the bits of the CPU's kernels, from and to each type of weights. A replay of 3.2 B
parameters takes at most 1.3 times as long as one plain pass over the same tensors, in bfloat16 from a base and in
float32 in place. A step of SPSA takes at most 1.05 times as long as its two forward passes over 8 x 512 tokens, of a
model of 0.6 B parameters in bfloat16, by moves and by table."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from claims import at_most, claim

from fedtune.methods import integers
from fedtune.methods.fedkseed import FedKSeedTable
from fedtune.model.forward import batch_of, forward_only, mean_loss
from fedtune.model.initial_values import Origin
from fedtune.model.tunable import attach
from fedtune.zeroth import Layout, Pool, replay, walk
from fedtune.zeroth.tables import fused
from on_gpu.models import base_of, data_of, net_of, seconds

Claims = Iterator[dict[str, object]]
POOL, SCALE, STEPS = Pool(0x1234567890ABCDEF, 4096), 3.1e-9, 8
TYPES = (torch.float32, torch.bfloat16, torch.float16)


def zeroth(device: torch.device, tiny: bool) -> Claims:
    yield from bits(device, 10_007 if tiny else 5_000_003)
    yield from passes(device, "tiny" if tiny else "3.2B")
    yield from steps(device, "tiny" if tiny else "0.6B", *((2, 8) if tiny else (8, 512)))


def accumulators() -> np.ndarray:
    return np.random.default_rng(1).integers(-20_000, 20_000, POOL.size)


def bits(device: torch.device, count: int) -> Claims:
    """With zeros of both signs and subnormal numbers, from an odd offset."""
    values = torch.from_numpy(np.random.default_rng(2).standard_normal(count, np.float32) * np.float32(0.02))
    values[::17], values[1::17], values[2::31] = 0.0, -0.0, 1e-41
    where = Layout({"x": 2**32 + 77}, {"x": count}, 2**32 + 77 + count)
    moves = [(5, 1e-3), (4000, -3.3e-7), (0, 0.0)]
    differ = 0
    for out, base in itertools.product(TYPES, TYPES):
        for work in (
            lambda named, first: replay(named, [(POOL, accumulators())], SCALE, base=first, layout=where),
            lambda named, first: walk(named, POOL, moves, base=first, layout=where),
        ):
            first = values.to(base)
            results = []
            for place in (torch.device("cpu"), device):
                named = {"x": torch.ones(count, dtype=out, device=place)}
                work(named, {"x": first.to(place)})
                results.append(named["x"].cpu().view(torch.uint8))
            differ += int((results[0] != results[1]).sum())
    yield claim("bytes of weights that differ from the CPU's", differ, 1, differ, "0", differ == 0)


def passes(device: torch.device, size: str) -> Claims:
    named = dict(net_of(size, device).named_parameters())
    count = sum(value.numel() for value in named.values())
    base = {name: value.detach() for name, value in named.items()}
    sums = [(POOL, accumulators())]
    for text, start in (("bfloat16 from a base", base), ("float32 in place", None)):
        kind = torch.bfloat16 if start else torch.float32
        out = {name: torch.empty_like(value, dtype=kind).normal_() for name, value in base.items()}

        def plain(out: dict[str, Any] = out, start: dict[str, Any] | None = start) -> None:
            for name, value in out.items():
                value.copy_(start[name]) if start else value.neg_()

        def ours(out: dict[str, Any] = out, start: dict[str, Any] | None = start) -> None:
            replay(out, sums, SCALE, base=start)

        found, floor = seconds(ours, device), seconds(plain, device)
        by = "Triton" if fused(POOL.size, device, kind, kind) else "no Triton"
        print(
            f"replay of {count:,} parameters, {text}, {by}: {1e3 * found:.2f} ms, a plain pass {1e3 * floor:.2f}"
        )
        yield at_most(f"seconds of a replay, {text}, other: a plain pass", found, floor, 1.3)
        del out


def steps(device: torch.device, size: str, batch: int, tokens: int) -> Claims:
    base = base_of(size, device)
    data = data_of(base, 2 * batch, tokens)
    for way in ("moves", "table"):
        table = FedKSeedTable(estimator="spsa", steps=STEPS, batch=batch, lr=1e-7, walk=way)  # type: ignore[arg-type]
        method, tunable = table.build(1, None), attach(base, table.trained, 1)  # type: ignore[arg-type]
        tunable.origin = Origin({name: base.weights[name] for name in tunable.named}, b"", 1)
        seeds = integers.draw(table.size, STEPS, (1, 1, 0))
        with forward_only(tunable, data):
            first = batch_of(tunable, data, list(range(batch)))
            two = 2 * seconds(lambda: mean_loss(tunable, first), device)  # noqa: B023
        of = {
            count: seconds(lambda: method.walk(tunable, data, 0, seeds[:count], 1), device, 3)  # noqa: B023
            for count in (1, STEPS)
        }
        one = (of[STEPS] - of[1]) / (STEPS - 1)
        print(
            f"a step by {way} of {base.size:,} parameters: {1e3 * one:.1f} ms, its two forwards {1e3 * two:.1f}"
        )
        yield at_most(f"seconds of a step by {way}, other: its two forward passes", one, two, 1.05)

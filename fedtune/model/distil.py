"""An emulator whose middle learns to say what the model's own says, on rows that are public.

Xiao, Lin and Han 2023, "Offsite-Tuning" (arXiv:2302.04870), section 3.3: layers are dropped, and those that
are left are distilled. Its loss, as in the authors' code (get_kd_loss of offsite_tuning/utils.py), with t and
s the hidden states (tokens, width) behind the middle of the model and of the emulator:

    mean (t - s)^2 / mean t^2   [+ lm * cross entropy of the emulator]

Front and end are the model's own in both and rest, so that the middles are given the same. Dropout is off.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from fedtune.disk import write_atomic
from fedtune.errors import FedtuneError
from fedtune.model.adapters import Full
from fedtune.model.base import Base
from fedtune.model.distil_settings import Distil
from fedtune.model.emulator import Emulation, block_of, emulate, tensor_of
from fedtune.model.encode import Encoded
from fedtune.model.fit import fit
from fedtune.model.loss import inputs_of, run, summed_loss
from fedtune.model.packing import shown_in
from fedtune.model.tunable import TunableModel, attach, detach, without
from fedtune.rng import seed_of, stream
from fedtune.schema import digest

MEASURED = 64  # rows on which the error is measured before and after


class Distilled(NamedTuple):
    """tensors  of the emulator's middle by their names in it, float32
    figures  error: before and after, of the rows that were measured"""

    tensors: dict[str, np.ndarray]
    figures: dict[str, float]


def kept_or_distilled(
    base: Base, about: Emulation, ends: Collection[int], settings: Distil, seed: int
) -> Distilled:
    """The middle of a base's emulator, as it was made once, or made now and kept. Raises R403 for a file that
    is not as it was written, D201 to D204 and D206 for rows that cannot be read."""
    assert base.public is not None  # the runtime gives it to every method that asks for public rows
    kept = base.public.kept
    if kept is not None and kept.exists():
        return read(kept)
    rows = base.public.rows()
    if 0 < settings.rows < len(rows):
        drawn = stream("public rows", seed).permutation(len(rows))[: settings.rows]
        rows = rows.some(sorted(drawn.tolist()))
    with without(base.attached) if base.attached else nullcontext():
        made = distilled(base, replace(about, bits=0), ends, rows, settings, seed_of("distil", seed))
    if kept is not None:
        text = json.dumps({"figures": made.figures, "digest": digest(made.tensors)}, sort_keys=True)
        write_atomic(kept, save(made.tensors, {"fedtune": text}))  # one key: safetensors keeps no order
    return made


def read(path: Path) -> Distilled:
    try:
        with safe_open(str(path), "np") as file:
            said = json.loads(file.metadata()["fedtune"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if digest(tensors) != said["digest"]:
            raise ValueError("other numbers than were written")
        return Distilled(tensors, said["figures"])
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        found = f"'{path}', which is no distilled emulator ({str(error)[:80]})"
        raise FedtuneError("R403", found, "the file as this run wrote it", "restore it from a copy") from None


def distilled(
    base: Base, about: Emulation, ends: Collection[int], rows: Encoded, settings: Distil, seed: int
) -> Distilled:
    """Train the middle of a base's emulator, of exact numbers; the base stays as it is."""
    small = emulate(base, about, ends)
    middle = [number for number in range(len(about.kept)) if number not in ends]
    after = middle[-1] + 1
    teacher = (about.kept[after] if after < len(about.kept) else about.blocks) - 1
    tunable = attach(small, Full(only=tuple(f"{about.layers}.{number}.*" for number in middle)), seed)
    says = partial(both_say, base, tunable, f"{about.layers}.{teacher}", f"{about.layers}.{middle[-1]}")

    def backward(micro: Sequence[Sequence[int]], batches: Sequence[dict[str, Any]], terms: int) -> float:
        tunable.net.eval()  # dropout would give the two middles different inputs
        total = 0.0
        for batch in batches:
            loss = error_of(*says(batch)) / len(batches)
            if settings.lm:
                loss = loss + settings.lm * summed_loss(tunable, batch)[0] / terms
            loss.backward()
            total += float(loss.detach())
        return total

    try:
        before = measured(says, rows, settings.train.batch)
        fit(tunable, rows, settings.train, seed, backward=backward)
        figures = {"before": before, "after": measured(says, rows, settings.train.batch)}
        tensors = {
            name: value for name, value in tunable.read().items() if block_of(name, about.layers) in middle
        }
    finally:
        detach(tunable)
    return Distilled(tensors, figures)


Said = tuple[torch.Tensor, torch.Tensor]


def both_say(
    base: Base, tunable: TunableModel, teacher: str, student: str, batch: dict[str, torch.Tensor]
) -> Said:
    """What is behind a block of the base's network and behind one of the emulator's, for the tokens of a
    batch that are no padding: twice (tokens, width) float32."""
    arguments, _ = inputs_of(tunable, batch)
    with torch.no_grad():
        theirs = behind(base.net, teacher, arguments)
    mine = behind(tunable.net, student, arguments)
    if "input_ids" in batch:
        shown = shown_in(batch).to(mine.device)
        return theirs[shown].float(), mine[shown].float()
    return theirs.flatten(0, 1).float(), mine.flatten(0, 1).float()


class Heard(Exception):
    """Ends a pass of a network where nobody needs the rest."""


def behind(net: Any, block: str, arguments: Mapping[str, Any]) -> torch.Tensor:
    """What a block says in a pass of the network, which ends there."""
    said: list[torch.Tensor] = []

    def hear(module: Any, args: Any, output: Any) -> None:
        said.append(tensor_of(output))
        raise Heard

    hook = net.get_submodule(block).register_forward_hook(hear)
    try:
        with suppress(Heard):
            run(net, arguments)
    finally:
        hook.remove()
    return said[0]


def error_of(theirs: torch.Tensor, mine: torch.Tensor) -> torch.Tensor:
    """mean (t - s)^2 / mean t^2."""
    return (theirs - mine).square().mean() / theirs.square().mean()


def measured(says: Callable[[dict[str, torch.Tensor]], Said], rows: Encoded, batch: int) -> float:
    """The error on the first rows."""
    count, off, whole = min(len(rows), MEASURED), 0.0, 0.0
    for start in range(0, count, batch):
        with torch.no_grad():
            theirs, mine = says(rows.collate(range(start, min(start + batch, count))))
        off += float((theirs - mine).double().square().sum())
        whole += float(theirs.double().square().sum())
    return off / whole

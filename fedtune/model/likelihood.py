"""What the base model, as it was before any tuning, thinks of a client's rows: how likely it finds their
responses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from fedtune import progress
from fedtune.model.device_memory import losses_in_parts
from fedtune.model.encode import Row, encode, joined
from fedtune.model.loss import autocast, inputs_of, logits_of
from fedtune.model.objectives.base import IGNORED
from fedtune.model.tunable import TunableModel, without

BATCH = 8  # rows at once


@contextmanager
def base_alone(tunable: TunableModel) -> Iterator[TunableModel]:
    """The base without its adapter, whatever it was trained to; the tunable model comes back as it was."""
    base, attached = tunable.base, tunable.base.attached
    with without(tunable):
        base.attached = None
        try:
            yield TunableModel(base, None, base.net.eval(), {}, [])
        finally:
            base.attached = attached


def response_bits(tunable: TunableModel, rows: Sequence[Row], how: Mapping[str, Any]) -> list[np.ndarray]:
    """log2 of the probability of each token of each row's response, (tokens,) float64: NaN for a first one
    that nothing stands before, and no tokens where data.max_length cuts the whole response.

    how  arguments of `encode`, `alive` among them
    """
    parts = [encode([row], tunable.base, **how) for row in rows]
    there = [number for number, part in enumerate(parts) if len(part)]
    found: list[np.ndarray] = [np.zeros(0)] * len(rows)
    whole = joined(parts, tunable.base)
    order = whole.by_length()

    def part(start: int, stop: int) -> list[np.ndarray]:
        with autocast(tunable, "off"):
            logits, labels = logits_of(tunable, *inputs_of(tunable, whole.collate(order[start:stop])))
        bits = logits.double().log_softmax(-1) / np.log(2)
        carried = labels != IGNORED
        said = bits.gather(-1, labels.clamp_min(0)[..., None])[..., 0]
        progress.say("reading rows", stop, len(order))
        how["alive"]()
        return [one[mask].cpu().numpy() for one, mask in zip(said, carried, strict=True)]

    def behind(number: int, bits: np.ndarray) -> np.ndarray:
        first = int(whole[number]["labels"][0] != IGNORED)
        told = int((whole[number]["labels"][1:] != IGNORED).sum())
        return np.concatenate([[np.nan] * first, bits[len(bits) - told :]])

    with torch.inference_mode():
        answers = [one for some in losses_in_parts(tunable.base, len(order), BATCH, part) for one in some]
    for number, bits in zip(order, answers, strict=True):
        found[there[number]] = behind(number, bits)
    return found

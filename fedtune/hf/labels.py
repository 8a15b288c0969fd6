"""Whose order of classes counts: the file's, where it knows the data's labels; else the head starts fresh,
and that is said."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fedtune.hf.draws import own_draws

GENERIC = re.compile(r"LABEL_(\d+)")  # what transformers calls classes that nobody named


@dataclass(frozen=True)
class LabelSet:
    """Labels in the order of the model's classes; `kept`: the file's head was trained for them; `note` says
    what was decided, or ""."""

    labels: tuple[str, ...]
    kept: bool
    note: str = ""


def choose_labels(config: Any, labels: Sequence[str]) -> LabelSet:
    """The order of `labels` in which the file's head knows them, or their own order with a fresh head.

    Names are compared without case and surrounding blanks; unnamed classes (LABEL_0, ...) stand for whole
    numbers only.
    """
    wanted = tuple(labels)
    if not has_head(config):
        return LabelSet(wanted, kept=False)
    known = named_classes(config.id2label)
    theirs = [known[number] for number in sorted(known)]
    mine = {fold(label): label for label in wanted}
    generic = [GENERIC.fullmatch(name) for name in theirs]
    if all(generic) and set(mine) == {match[1] for match in generic if match}:
        theirs = [match[1] for match in generic if match]
    if len(mine) == len(wanted) == len(theirs) and {fold(name) for name in theirs} == set(mine):
        ordered = tuple(mine[fold(name)] for name in theirs)
        return LabelSet(
            ordered,
            True,
            f"the task head of the model file is kept; its order of classes counts: {shown(ordered)}",
        )
    return LabelSet(
        wanted,
        False,
        f"the model file's task head was trained for other classes ({shown(theirs)}), so it starts fresh",
    )


def has_head(config: Any) -> bool:
    """Whether the file was written by a classifier of one label a row; a regression or multi-label head is
    another task's."""
    classifier = any("Classification" in name for name in config.architectures or ())
    return classifier and getattr(config, "problem_type", None) in (None, "single_label_classification")


def named_classes(id2label: Mapping[Any, str]) -> dict[int, str]:
    return {int(number): str(name) for number, name in id2label.items()}


def fold(label: str) -> str:
    return label.strip().casefold()


def shown(labels: Sequence[str]) -> str:
    return ", ".join(labels[:6]) + (" ..." if len(labels) > 6 else "")


def redraw(net: Any, heads: Sequence[str], seed: int) -> frozenset[str]:
    """Initialise these modules as the architecture does for a new model, from `seed` alone; returns the names
    of their parameters."""
    names = set[str]()
    with own_draws(seed), torch.no_grad():
        for path in heads:
            for module in net.get_submodule(path).modules():
                module._is_hf_initialized = False
                for value in module._parameters.values():
                    if value is not None:
                        value._is_hf_initialized = False
                net._init_weights(module)
            names |= {f"{path}.{name}" for name, _ in net.get_submodule(path).named_parameters()}
    return frozenset(names)

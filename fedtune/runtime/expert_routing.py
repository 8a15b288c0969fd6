"""All experts of a run at once: a router over its library, scored client by client, or put on a model to
generate with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors.numpy import load_file

from fedtune.aggregate import ranks as ranks_of
from fedtune.errors import FedtuneError
from fedtune.experts.cards import GENERAL, cards
from fedtune.runtime.expert_library import INPUTS, library
from fedtune.runtime.expert_scores import halves_of, scored, summed
from fedtune.runtime.finished import installed
from fedtune.runtime.folder import RunFolder

if TYPE_CHECKING:
    from fedtune.experts.routers import Router, Routing
    from fedtune.model.base import Base
    from fedtune.model.tunable import TunableModel


def routed(folder: RunFolder, routing: Routing | None, null: bool = False) -> dict[str, Any]:
    """Losses of the router on the second half of each client's held-out rows, by client, and what it did;
    None: the gate that the run has trained. Raises D202, M305, R406."""
    place = library(folder)
    workspace, _, _ = installed(folder, "last", data=True)
    halves = halves_of(workspace)
    tunable, router = put(workspace.base, place, routing, null)
    try:
        losses = {name: scored(tunable, rows[1], workspace).loss for name, rows in halves.items()}
    finally:
        router.detach()
    names = [*router.names, *(["nobody"] if router.null else [])]
    return {"losses": losses, "health": router.health.report(names)}


def put(base: Base, place: Path, routing: Routing | None, null: bool = False) -> tuple[TunableModel, Router]:
    """The base with the general expert on it and a router over all others, attached; None: by the library's
    gate, over the experts that it knows. Raises M305 where there is none."""
    from fedtune.experts.routers import loaded, router
    from fedtune.model.lora_files import read_expert, seated
    from fedtune.types import LM_TASKS

    found = [name for name in cards(place) if name != GENERAL]
    if not found:
        raise FedtuneError(
            "M305",
            "a library of the general expert alone",
            "an expert beside it",
            "add one, or load the adapter",
        )
    tensors, like = summed([read_expert(place / GENERAL)])
    tunable = seated(base, like, tensors, max(ranks_of(tensors).values()))
    experts = {name: read_expert(place / name).tensors for name in found}
    if routing is None:
        require_gate(place)
        made = loaded(place, experts, {})
    else:
        moments = moments_of(place, found, routing)
        made = router(experts, {}, routing, base.task in LM_TASKS, moments, null=null)
    made.attach(base.net)
    return tunable, made


def gate_in(place: Path) -> dict[str, Any]:
    """What gate.json says of the library's trained gate; {} where there is none."""
    from fedtune.experts.routers import SETTINGS

    file = place / SETTINGS
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.exists() else {}


def require_gate(place: Path) -> None:
    """Raises M305."""
    if not gate_in(place):
        raise FedtuneError(
            "M305",
            "a library without a trained gate",
            "a run with [method.experts.gate]",
            "route with --gate means or --gate arrow",
        )


def moments_of(place: Path, names: list[str], routing: Routing) -> Mapping[str, Mapping[str, np.ndarray]]:
    """What owners summed up, by expert and layer of the base. Raises M305 where a router needs it and it is
    missing."""
    from fedtune.experts.routers import PREFIX

    if routing.gate != "means":
        return {}
    if missing := [name for name in names if not (place / name / INPUTS).exists()]:
        raise FedtuneError(
            "M305",
            f"expert '{missing[0]}' without {INPUTS}",
            "the mean inputs of every expert's rows",
            "route with --gate arrow, which needs the adapters alone",
        )
    return {
        name: {layer.removeprefix(PREFIX): value for layer, value in load_file(place / name / INPUTS).items()}
        for name in names
    }

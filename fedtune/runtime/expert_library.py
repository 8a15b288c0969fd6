"""The experts of a run as a library in its folder: made from the run's last state when it is first asked
for, changed by its owners afterwards."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from safetensors.numpy import save_file

from fedtune.disk import write_atomic
from fedtune.errors import FedtuneError
from fedtune.experts.cards import GENERAL, Card, cards, known, library_sha256, new_id, sha256_of, write
from fedtune.experts.state import A_END, B_END, experts_of, fresh_a, groups_of, inputs_of, rank_of
from fedtune.exports import card as readme
from fedtune.exports import whole_folder
from fedtune.runtime.certificate import certificate
from fedtune.runtime.finished import installed
from fedtune.runtime.folder import RunFolder, recipe_of
from fedtune.runtime.journal import Journal

if TYPE_CHECKING:
    from fedtune.experts.routers import Router
    from fedtune.model.tunable import TunableModel
    from fedtune.types import State, Tensors

FOLDER, REMOVED = "experts", "experts-removed"
INPUTS = "inputs.safetensors"  # beside an adapter: what comes into its layers on its owners' rows
LOSS = "expert_loss/"  # a round's figure of an expert


def library(folder: RunFolder) -> Path:
    """Where the experts are. Raises R402 for a run without a finished round, M306 for one without LoRA."""
    place = folder.path / FOLDER
    if not place.exists():
        make(folder, place)
    return place


def make(folder: RunFolder, place: Path) -> None:
    recipe = recipe_of(folder)
    workspace, state, number = installed(folder, "last")
    if workspace.tunable.kind != "lora":
        raise FedtuneError(
            "M306",
            f"experts beside an adapter of kind '{workspace.tunable.kind}'",
            "a run with method.adapter.kind = 'lora'",
            "choose another run",
        )
    text = readme(recipe, "experts", workspace.base.fingerprint, number)
    with whole_folder(place) as temporary:
        write_all(temporary, folder, workspace.tunable, state, text, recipe.seed)
        if workspace.tunable.routed is not None:
            write_gate(temporary, folder, workspace.tunable.routed)


def write_all(
    place: Path, folder: RunFolder, tunable: TunableModel, state: State, text: str, seed: int
) -> None:
    """The general expert, which is installed, and every other, with the general one's task head."""
    from fedtune.model.export import save_adapter
    from fedtune.model.lora_files import narrow
    from fedtune.model.lora_ranks import resize, scale_of, thaw

    thaw(tunable)
    general, scale = tunable.read(), scale_of(tunable)
    groups, history, inputs = groups_of(state.kept), History(folder), inputs_of(state.kept)
    for name, tensors in {GENERAL: general, **experts_of(state.shared)}.items():
        resize(tunable, rank_of(tensors), scale)
        tunable.write(general if name == GENERAL else {**alone(general, seed), **tensors})
        save_adapter(tunable, place / name, tunable.base.name, text)
        narrow(place / name, {tensor.removesuffix(B_END) for tensor in tensors if tensor.endswith(B_END)})
        if name in inputs:
            save_file(inputs[name], place / name / INPUTS)
        members = groups.get(name, ()) if name != GENERAL else history.members
        losses = history.losses("loss" if name == GENERAL else LOSS + name)
        card = Card(
            id=name,
            made_by="run",
            beneath="" if name == GENERAL else GENERAL,
            rank=rank_of(tensors),
            sha256=sha256_of(place / name),
            base=tunable.base.name,
            base_fingerprint=tunable.base.fingerprint,
            owners=len(members),
            weight=sum(history.weights[client] for client in members if client in history.weights),
            rounds=len(losses),
            losses=losses,
        )
        write(place / name, card)


def alone(general: Tensors, seed: int) -> dict[str, np.ndarray]:
    """What an expert does not say: factors A that are frozen as the seed made them, and the head."""
    return {
        name: fresh_a(name, value.shape, seed) if name.endswith(A_END) else value
        for name, value in general.items()
    }


class History:
    """What a run's journal knows of its members."""

    def __init__(self, folder: RunFolder) -> None:
        journal = Journal(folder.journal)
        try:
            self.metrics = [committed.metrics for committed in journal.rounds()]
            counted = [answer for _, answer in journal.answers() if answer.outcome == "ok"]
        finally:
            journal.close()
        self.weights: dict[int, float] = {}  # of the first answer: in the last round, tokens
        for answer in counted:
            self.weights.setdefault(answer.client, answer.weight)
        self.members = tuple(sorted(self.weights))

    def losses(self, figure: str) -> tuple[float, ...]:
        return tuple(round(metrics[figure], 6) for metrics in self.metrics if figure in metrics)


def write_gate(place: Path, folder: RunFolder, router: Router) -> None:
    """gate.safetensors and gate.json: what it is over, how it keeps, what its clients' answers said of it."""
    history = History(folder)
    names = [*router.names, *(["nobody"] if router.null else [])]
    numbers = [*map(str, range(len(router.names))), *(["null"] if router.null else [])]
    shares = {
        name: history.losses(f"gate_share/{number}")[-1:] for name, number in zip(names, numbers, strict=True)
    }
    router.save(
        place,
        losses=history.losses("gate_loss"),
        entropy=history.losses("gate_entropy"),
        shares={name: share[0] for name, share in shares.items() if share},
        sha256s={name: sha256_of(place / name) for name in router.names},
    )


# --- changes


def placed(place: Path, name: str, card: Card, fill: Callable[[Path], None]) -> None:
    """A new expert: its folder is filled, and appears whole or not at all. The card's rank and hash are the
    file's."""
    from fedtune.model.lora_files import read_expert

    with whole_folder(place / name) as temporary:
        fill(temporary)
        write(temporary, replace(card, rank=read_expert(temporary).rank, sha256=sha256_of(temporary)))


def add(folder: RunFolder, source: Path, name: str, on_general: bool = False) -> Card:
    """Take in an adapter that its owner trained, with fedtune or with stock peft.

    on_general  it was trained on top of the general expert, not on the base alone

    Raises C103 for the name, M304, M305, M306 for an adapter that is not of this base.
    """
    from fedtune.model.lora_files import read_expert
    from fedtune.model.same_base import check_same, check_union, named

    place, home = library(folder), folder.origin() or Path.cwd()
    found = cards(place)
    new_id(name, found)
    expert, like = read_expert(source), read_expert(place / GENERAL)
    check_same([like, expert], home)
    check_union([expert], named(like, home))
    card = replace(
        found[GENERAL],
        id=name,
        made_by="owner",
        beneath=GENERAL if on_general else "",
        owners=1,
        weight=0.0,
        rounds=0,
        losses=(),
    )
    placed(place, name, card, lambda temporary: copied(expert.path, temporary))
    return cards(place)[name]


def without(place: Path, name: str) -> None:
    """The gate's rows of an expert go with it; a gate with nothing left to choose from goes as a whole."""
    from fedtune.experts.leaving import drop
    from fedtune.experts.routers import GATES, SETTINGS

    if (place / SETTINGS).exists() and not drop(place, name):
        for file in (SETTINGS, GATES):
            (place / file).unlink()


def copied(source: Path, target: Path) -> None:
    """Plain files only, as an adapter's folder has them."""
    target.mkdir(parents=True)
    for file in sorted(source.iterdir()):
        if file.is_file():
            shutil.copy(file, target / file.name)


def remove(folder: RunFolder, name: str, now: datetime, keys: Path | None = None) -> Path:
    """Take an expert out at once; the certificate of it: what, when, and hashes before and after.

    keys  of a member that signs; without them the certificate is as true as the folder that it is in

    Raises C103 for an expert that is not there, and for the general one, on which others stand.
    """
    place = library(folder)
    card = known(cards(place), name)
    if above := [other.id for other in cards(place).values() if name == other.beneath]:
        raise FedtuneError(
            "C103",
            f"'{name}', beneath {', '.join(above[:5])}",
            "an expert that no other stands on",
            "remove those first, or leave it",
        )
    before = library_sha256(place)
    gone = place / f".{name}.part"
    without(place, name)
    (place / name).replace(gone)  # from here on nobody finds it
    shutil.rmtree(gone)
    record = {
        "what": f"expert '{name}' ({card.made_by}) was removed from the library of run '{folder.path.name}'",
        "when": now.isoformat(),
        "expert": name,
        "expert_sha256": card.sha256,
        "base_fingerprint": card.base_fingerprint,
        "library_before": before,
        "library_after": library_sha256(place),
    }
    target = folder.path / REMOVED / f"{name}-{now.strftime('%Y%m%dT%H%M%S%f')}.json"
    write_atomic(target, certificate(record, keys))
    return target

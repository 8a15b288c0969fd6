"""How good each expert is for each client: experts x clients, on rows that the clients hold out.

A client's rows are halved: what is chosen (its best expert, or none) is chosen on the first half, and told
of the second, so that a choice among many does not flatter itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedtune.aggregate import MERGES, ClientAdapter
from fedtune.aggregate import ranks as ranks_of
from fedtune.config import method_of
from fedtune.errors import FedtuneError
from fedtune.experts.cards import GENERAL, Card, cards
from fedtune.rng import seed_of
from fedtune.runtime.expert_library import library
from fedtune.runtime.finished import installed
from fedtune.runtime.folder import RunFolder

if TYPE_CHECKING:
    from fedtune.model.base import Base
    from fedtune.model.encode import Encoded
    from fedtune.model.tunable import TunableModel
    from fedtune.runtime.workspace import Workspace

BASE = "base"
Losses = Mapping[str, Mapping[str, float]]  # expert -> client -> mean loss


@dataclass(frozen=True)
class Matrix:
    """Losses of the base and of every expert (with what is beneath it), on both halves of each client's rows.

    groups  client -> the expert that it helped to make, "" for none
    """

    metric: str
    chosen_on: Losses
    told_of: Losses
    groups: Mapping[str, str]

    @property
    def clients(self) -> list[str]:
        return list(self.told_of[BASE])

    @property
    def experts(self) -> list[str]:
        return [name for name in self.told_of if name not in (BASE, GENERAL)]

    def best(self, client: str) -> str:
        """By the first half: an expert that beats the general one there, or the general one."""
        losses = {name: found[client] for name, found in self.chosen_on.items() if name != BASE}
        return min(losses, key=lambda name: (losses[name], name != GENERAL, name))

    def report(self) -> list[dict[str, Any]]:
        """For each client, losses on the second half: base, general, its own group's expert, the one that
        the first half chose, and the least that any has (oracle)."""
        rows = []
        for client in self.clients:
            told = {name: found[client] for name, found in self.told_of.items()}
            own, best = self.groups.get(client, ""), self.best(client)
            rows.append(
                {
                    "client": client,
                    "base": told[BASE],
                    "general": told[GENERAL],
                    "own": told.get(own),
                    "own_expert": own,
                    "best": told[best],
                    "best_expert": best,
                    "fell_back": best == GENERAL,
                    "oracle": min(value for name, value in told.items() if name != BASE),
                }
            )
        return rows


def evaluate(folder: RunFolder) -> Matrix:
    """Raises D202 where no client holds out two rows, R406 where the data has changed."""
    place = library(folder)
    found = cards(place)
    workspace, state, _ = installed(folder, "last", data=True)
    halves = halves_of(workspace)
    losses: tuple[dict[str, dict[str, float]], ...] = ({}, {})
    metric = ""
    for name, tunable in seats(workspace.base, place, found):
        for half in (0, 1):
            scores = {client: scored(tunable, rows[half], workspace) for client, rows in halves.items()}
            losses[half][name] = {client: score.loss for client, score in scores.items()}
            metric = next(iter(scores.values())).name
    return Matrix(metric, losses[0], losses[1], own_experts(state.kept, workspace))


def halves_of(workspace: Workspace) -> dict[str, tuple[Encoded, Encoded]]:
    """Client -> both halves of the rows that it holds out. Raises D202."""
    halves = {
        name: (part(workspace, number, 0), part(workspace, number, 1))
        for number, name in workspace.names.items()
        if len(workspace.held_out(number)) > 1
    }
    if not halves:
        raise FedtuneError(
            "D202", "no client that holds out two rows", "two at least", "raise data.client_test_share"
        )
    return halves


def alone(folder: RunFolder) -> dict[str, float]:
    """Losses of adapters that each client trained by itself, from the run's start and for as many steps, on
    the second half."""
    workspace, _, _ = installed(folder, "last", data=True)
    recipe, halves, found = workspace.recipe, halves_of(workspace), dict[str, float]()
    method = method_of(recipe)
    tunable = method.prepare(workspace.base, recipe.seed)
    start = method.start(tunable)
    for number, name in workspace.names.items():
        if name in halves:
            method.alone(tunable, workspace.train(number), start, seed_of("alone", recipe.seed, number + 1))
            found[name] = scored(tunable, halves[name][1], workspace).loss
    return found


def own_experts(kept: Mapping[str, Any], workspace: Workspace) -> dict[str, str]:
    from fedtune.experts.state import groups_of

    groups = groups_of(kept)
    return {
        name: next((group for group, members in groups.items() if number in members), "")
        for number, name in workspace.names.items()
    }


def part(workspace: Workspace, number: int, half: int) -> Encoded:
    """Every second of a client's held-out rows."""
    from fedtune.model.encode import every_second

    return every_second(workspace.held_out(number), half)


def scored(tunable: TunableModel, rows: Encoded, workspace: Workspace) -> Any:
    from fedtune.model.score import score

    return score(tunable, rows, workspace.recipe.evaluate.batch)


def seats(base: Base, place: Path, found: Mapping[str, Card]) -> Iterator[tuple[str, TunableModel]]:
    """The base, and each expert on what is beneath it, one after the other on the same network."""
    from fedtune.model.lora_files import read_expert, seated

    for name, card in {BASE: found[GENERAL], **found}.items():
        stack = [place / card.id, *([place / card.beneath] if card.beneath else [])]
        tensors, like = summed([read_expert(folder) for folder in stack])
        if name == BASE:
            tensors = {key: 0 * value if ".lora_" in key else value for key, value in tensors.items()}
        yield name, seated(base, like, tensors, max(ranks_of(tensors).values()))


def summed(experts: Sequence[Any]) -> tuple[dict[str, Any], Any]:
    """Several adapters at once, exactly: their products add up. Heads are the first one's."""
    from fedtune.model.union import aligned

    alike, _ = aligned(list(experts))
    merge = MERGES["task"](lam=1.0)
    made = merge([ClientAdapter(n, one.tensors) for n, one in enumerate(alike)], 0, 1.0)
    return {**made.tensors, **alike[0].plain}, alike[0]

"""Experts made of experts: merged, pruned, written for other programs."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fedtune.aggregate import split
from fedtune.aggregate.product import inner
from fedtune.errors import FedtuneError
from fedtune.experts.cards import GENERAL, Card, cards, known, new_id
from fedtune.exports import check_target, whole_folder
from fedtune.runtime.expert_library import copied, library, placed
from fedtune.runtime.expert_scores import Matrix
from fedtune.runtime.folder import RunFolder
from fedtune.runtime.merge import Asked, Merged, merge_adapters

if TYPE_CHECKING:
    from fedtune.model.lora_files import Expert

NEW = Asked("task", {"lam": "1"})  # the sum of products, exactly


def merge(folder: RunFolder, names: Sequence[str], asked: Asked, name: str) -> Merged:
    """Several experts become a new one, on the products B A; the old ones stay. Raises C103 where they do
    not stand on the same expert, and what `fedtune merge` raises."""
    place = library(folder)
    found = cards(place)
    new_id(name, found)
    parents = [known(found, one) for one in names]
    beneath = {card.beneath for card in parents}
    if len(beneath) > 1:
        raise FedtuneError(
            "C103",
            f"{' and '.join(names)}, of which some stand on the general expert and some on the base alone",
            "experts that stand on the same",
            "merge those that do",
        )
    made: list[Merged] = []
    card = Card(
        id=name,
        made_by="merge",
        beneath=beneath.pop() if beneath else "",
        rank=0,
        sha256="",
        base=parents[0].base,
        base_fingerprint=parents[0].base_fingerprint,
        owners=sum(one.owners for one in parents),
        weight=sum(one.weight for one in parents),
        parents=tuple(names),
    )

    def fill(temporary: Path) -> None:
        made.append(merge_adapters([place / one.id for one in parents], asked, temporary))

    placed(place, name, card, fill)
    return made[0]


def like(one: Expert, other: Expert) -> float:
    """The cosine of two adapters' products over all layers that both have."""
    pairs = [split(expert.tensors)[0] for expert in (one, other)]
    both = sum(inner(pairs[0][name], pairs[1][name]) for name in pairs[0].keys() & pairs[1].keys())
    sizes = [sum(inner(pair, pair) for pair in some.values()) for some in pairs]
    return both / math.sqrt(sizes[0] * sizes[1]) if sizes[0] and sizes[1] else 0.0


def superfluous(folder: RunFolder, above: float, matrix: Matrix) -> list[tuple[str, str, float]]:
    """Experts that are like another one (cosine above) and without which no client's best is worse: each
    with the other and their cosine. Of two, the one with the smaller weight goes."""
    from fedtune.model.lora_files import read_expert

    place = library(folder)
    found = {name: card for name, card in cards(place).items() if name != GENERAL}
    read = {name: read_expert(place / name) for name in found}
    gone: list[tuple[str, str, float]] = []
    for name in sorted(found, key=lambda name: (found[name].weight, name)):
        left = [other for other in found if other != name and other not in {one for one, _, _ in gone}]
        near = max(left, key=lambda other: like(read[name], read[other]), default="")
        if near and (cosine := like(read[name], read[near])) > above and not missed(name, left, matrix):
            gone.append((name, near, cosine))
    return gone


def missed(name: str, left: Sequence[str], matrix: Matrix) -> bool:
    """Whether some client's best loss, on the half that chooses, is greater without this expert."""
    chosen = matrix.chosen_on
    return any(
        min(chosen[one][client] for one in (GENERAL, *left)) > chosen[name][client]
        for client in matrix.clients
    )


# --- for other programs


def export(folder: RunFolder, names: Sequence[str], to: Path, most: int = 64) -> list[Path]:
    """One expert as an adapter in `to`, or several (none named: all) in folders of their own, with
    lora_modules.json for servers such as vLLM. What is beneath an expert is inside, exactly: its rank is
    the sum of both.

    Raises C103, R401, M306 for a rank above `most` or for what such servers do not load: heads, biases,
    embeddings.
    """
    check_target(to)
    place = library(folder)
    found = cards(place)
    chosen = [known(found, name) for name in names] or list(found.values())
    if len(names) == 1:
        written(place, chosen[0], to)
        return [to]
    for card in chosen:
        check_servable(place, card, found, most)
    with whole_folder(to) as temporary:
        temporary.mkdir(parents=True)
        for card in chosen:
            written(place, card, temporary / card.id)
        modules = [{"name": card.id, "path": card.id} for card in chosen]
        (temporary / "lora_modules.json").write_text(json.dumps(modules, indent=2) + "\n")
    return [to / card.id for card in chosen]


def written(place: Path, card: Card, to: Path) -> None:
    if card.beneath:
        merge_adapters([place / card.id, place / card.beneath], NEW, to)
    else:
        with whole_folder(to) as temporary:
            copied(place / card.id, temporary)


def check_servable(place: Path, card: Card, found: dict[str, Card], most: int) -> None:
    """Raises M306."""
    from fedtune.model.lora_files import BIAS, EMBEDDING, read_expert

    expert = read_expert(place / card.id)
    rank = card.rank + (found[card.beneath].rank if card.beneath else 0)
    odd = sorted(expert.plain) or [name for name in expert.shapes if name.endswith((BIAS, EMBEDDING))]
    if rank > most:
        raise FedtuneError(
            "M306",
            f"expert '{card.id}' of rank {rank}",
            f"at most {most}",
            "raise --max-rank to what the server allows, or merge it to a lower rank",
        )
    if odd:
        raise FedtuneError(
            "M306",
            f"'{odd[0]}' in expert '{card.id}'",
            "LoRA pairs of linear layers alone, which servers load side by side",
            "export experts one by one",
        )

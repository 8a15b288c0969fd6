"""A library of experts on disk: a folder each, with the adapter that stock peft loads and card.json, which
says what it is."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from fedtune.disk import json_text
from fedtune.errors import FedtuneError

CARD, TENSORS = "card.json", "adapter_model.safetensors"
GENERAL = "general"
ID = re.compile(r"[a-z0-9][a-z0-9_-]{0,31}")


@dataclass(frozen=True)
class Card:
    """What is known of an expert.

    made_by           run: its members' sum; owner: trained elsewhere, handed in; merge: of `parents`
    beneath           the expert on top of which it stands; "" where it stands on the base alone
    owners, weight    how many clients made it, and what their answers weighed in the last round (rows, as a
    rule) rounds, losses    in which it was trained, and the mean training loss of each
    sha256            of its tensors' file
    """

    id: str
    made_by: Literal["run", "owner", "merge"]
    beneath: str
    rank: int
    sha256: str
    base: str = ""
    base_fingerprint: str = ""
    owners: int = 1
    weight: float = 0.0
    rounds: int = 0
    losses: tuple[float, ...] = ()
    parents: tuple[str, ...] = ()


def cards(library: Path) -> dict[str, Card]:
    """Of all experts, by id; the general one is first. Raises R403 for a card that cannot be read."""
    found = [read(folder) for folder in sorted(library.iterdir()) if (folder / CARD).exists()]
    return {card.id: card for card in sorted(found, key=lambda card: (card.id != GENERAL, card.id))}


def read(folder: Path) -> Card:
    try:
        tree: dict[str, Any] = json.loads((folder / CARD).read_text(encoding="utf-8"))
        lists = {key: tuple(value) for key, value in tree.items() if isinstance(value, list)}
        return Card(**(tree | lists))
    except (OSError, ValueError, TypeError) as error:
        raise FedtuneError(
            "R403",
            f"'{folder / CARD}', which cannot be read ({type(error).__name__})",
            "the card of an expert",
            "restore it, or take the expert out with: fedtune experts remove",
        ) from error


def write(folder: Path, card: Card) -> None:
    (folder / CARD).write_text(json_text(asdict(card), indent=2) + "\n", encoding="utf-8")


def known(found: Mapping[str, Card], name: str) -> Card:
    """Raises C103 for an expert that is not there."""
    if name not in found:
        raise FedtuneError(
            "C103",
            f"expert '{name[:40]}'",
            f"one of {', '.join(found)}",
            "list them with: fedtune experts list",
        )
    return found[name]


def new_id(name: str, found: Mapping[str, Card]) -> str:
    """Raises C103 for an id that is taken, or is none."""
    if not ID.fullmatch(name) or name in found:
        raise FedtuneError(
            "C103",
            f"'{name[:40]}' as the id of a new expert",
            "up to 32 small letters, digits, - and _, and none that is taken",
            "choose another --as",
        )
    return name


def sha256_of(folder: Path) -> str:
    with (folder / TENSORS).open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def library_sha256(library: Path) -> str:
    """Over all experts' ids, tensors and cards: what a certificate names."""
    total = hashlib.sha256()
    for name in sorted(cards(library)):
        parts = [name, sha256_of(library / name), (library / name / CARD).read_text(encoding="utf-8")]
        total.update(json.dumps(parts).encode())
    return total.hexdigest()

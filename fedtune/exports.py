"""A run's model in the forms that other programs read, each with a card that says where it came from."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from fedtune.config import Recipe
from fedtune.disk import disk_errors
from fedtune.errors import FedtuneError
from fedtune.methods import Method
from fedtune.methods.seeds import Seeds
from fedtune.types import State

LIBRARIES = {"adapter": "peft", "merged": "transformers", "seeds": "fedtune"}
NO_PRIVACY = "- differential privacy: none (epsilon is unbounded)"


def export_final(
    method: Method,
    state: State,
    tunable: Any,
    target: Path,
    recipe: Recipe,
    result: Mapping[str, Any],
    number: int,
) -> None:
    """The run folder's own adapter/ (or adapter-last/) of a round, replaced as a whole: a crash leaves the
    old one or the new one."""
    form = method.facts.forms[0]
    with whole_folder(target) as temporary:
        text = card(
            recipe,
            method.facts.title,
            str(result["base_sha256"]),
            number,
            result if number == result["kept_round"] else None,
            form,
            which(number, int(result["rounds"]), result["best"]),
        )
        method.export(form, state, tunable, temporary, text, recipe.seed)


@contextlib.contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A folder to fill, which then takes the target's place; a crash leaves the old one, the new one, or for
    an
    instant neither; never a part of one. Raises R404."""
    temporary, old = target.with_name(f".{target.name}.part"), target.with_name(f".{target.name}.old.part")
    with disk_errors(target):
        try:
            for left in (temporary, old):
                shutil.rmtree(left, ignore_errors=True)
            yield temporary
            swap(temporary, target, old)
        except SafetensorError as error:  # how safetensors tells of a full disk
            raise FedtuneError(
                "R404", sentence=f"cannot write to '{target}' ({error})", do="free space and try again"
            ) from error
        finally:
            for left in (temporary, old):
                shutil.rmtree(left, ignore_errors=True)


def swap(new: Path, target: Path, old: Path) -> None:
    """Put a folder in the place of another."""
    if target.exists():
        target.replace(old)
    new.replace(target)


def check_target(target: Path) -> Path:
    """Refuse to write over anything. Raises R401."""
    if target.exists():
        raise FedtuneError(
            "R401", f"'{target}', which already exists", "a folder that does not exist", "choose another --to"
        )
    return target


def card(
    recipe: Recipe,
    title: str,
    base: str,
    rounds: int,
    result: Mapping[str, Any] | None = None,
    form: str = "adapter",
    chosen: str = "",
) -> str:
    """README.md of an export: recipe, rounds, data, privacy, fingerprints. chosen: why it is this round."""
    scores = [
        f"| {key} | {result[key]:.4f} |"
        for key in ("base", "local", "federated", "centralised")
        if result and result.get(key) is not None
    ]
    table = [f"| | {result['metric']} |", "|---|---|", *scores, ""] if result else []
    return "\n".join(
        [
            "---",
            f"library_name: {LIBRARIES[form]}",
            f"base_model: {recipe.model.name}",
            "tags: [federated, fedtune]",
            "---",
            "",
            f"# {title} after {rounds} rounds",
            "",
            *table,
            *([f"- round: {chosen}"] if chosen else []),
            f"- task: {recipe.data.task}, data source: {recipe.data.source}",
            f"- partition: {recipe.partition.by}",
            f"- seed: {recipe.seed}; recipe SHA-256: {recipe.fingerprint}",
            f"- base model SHA-256: {base}",
            NO_PRIVACY,
            "",
            "```toml",
            *recipe_lines(recipe),
            "```",
            "",
        ]
    )


def which(number: int, rounds: int, best: Mapping[str, Any] | None) -> str:
    """Which of its run's rounds a model is of, for its card."""
    if best is None or best["round"] != number:
        return f"{number} of {rounds}" + (", the last one" if number == rounds else "")
    flatters = ", so that score flatters" if best.get("of") == "test rows" else ""
    said = f"the best of those that were scored: {best['metric']} {best['value']:.4f}"
    return f"{number} of {rounds}, {said} on {best.get('of', 'rows at the sites')}{flatters}"


def seeds_card(seeds: Seeds, title: str) -> str:
    """README.md of a model that was rebuilt from a seed file."""
    head = [
        "---",
        "library_name: transformers",
        f"base_model: {seeds.base}",
        "tags: [federated, fedtune]",
        "---",
        "",
    ]
    facts = [
        f"- task: {seeds.task}",
        f"- seed: {seeds.seed}",
        f"- base model SHA-256: {seeds.base_fingerprint}",
        NO_PRIVACY,
    ]
    return "\n".join(
        [*head, f"# {title} after {seeds.rounds} rounds, rebuilt from a seed file", "", *facts, ""]
    )


def recipe_lines(recipe: Recipe) -> list[str]:
    """The resolved recipe as TOML lines."""
    import tomli_w

    return tomli_w.dumps(recipe.model_dump(mode="json")).splitlines()

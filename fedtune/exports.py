"""A run's model in the forms that other programs read, each with a card that says where it came from."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from fedtune.config import Recipe
from fedtune.disk import disk_errors
from fedtune.errors import FedtuneError
from fedtune.hf.licence import licence_of
from fedtune.methods import Method
from fedtune.methods.seeds import Seeds
from fedtune.types import State

LIBRARIES = {
    "adapter": "peft",
    "peft": "peft",
    "vllm": "peft",
    "merged": "transformers",
    "gguf": "gguf",
    "sentence-transformers": "sentence-transformers",
    "seeds": "fedtune",
}
TASKS = {  # the hub's words
    "classify": "text-classification",
    "instruct": "text-generation",
    "preference": "text-generation",
    "causal-lm": "text-generation",
    "image-classify": "image-classification",
}
EXAMPLES: dict[str, dict[str, Any]] = {
    "text-classification": {"text": "A sentence to classify."},
    "text-generation": {"messages": [{"role": "user", "content": "What can you tell me?"}]},
}
NO_PRIVACY = "- differential privacy: none (epsilon is unbounded)"


def export_final(
    method: Method,
    state: State,
    tunable: Any,
    target: Path,
    recipe: Recipe,
    result: Mapping[str, Any],
    number: int,
    data: Mapping[str, Any] | None = None,
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
            data,
            result["privacy"],
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
    data: Mapping[str, Any] | None = None,
    privacy: Sequence[str] = (),
) -> str:
    """README.md of an export: recipe, rounds, data, privacy, fingerprints.

    form    of the method's, or the program that it is for
    chosen  why it is this round
    data    what data.json of the run says
    privacy what the run says of its own
    """
    scores = [
        f"| {key} | {result[key]:.4f} |"
        for key in ("base", "local", "federated", "centralised")
        if result and result.get(key) is not None
    ]
    table = [f"| | {result['metric']} |", "|---|---|", *scores, ""] if result else []
    licence = licence_of(recipe.model.name)
    return "\n".join(
        [
            "---",
            front(recipe, form, licence, result),
            "---",
            "",
            f"# {title} after {rounds} rounds",
            "",
            *table,
            *([f"- round: {chosen}"] if chosen else []),
            f"- task: {recipe.data.task}, data source: {recipe.data.source}",
            f"- partition: {recipe.partition.by}",
            *(sizes(data) if data else []),
            f"- licence of the base: {licence or 'not stated where it was read; ask its authors'}",
            f"- seed: {recipe.seed}; recipe SHA-256: {recipe.fingerprint}",
            f"- base model SHA-256: {base}",
            *privacy_lines(privacy),
            "",
            "```toml",
            *recipe_lines(recipe),
            "```",
            "",
        ]
    )


def front(recipe: Recipe, form: str, licence: str, result: Mapping[str, Any] | None) -> str:
    """The card's front matter, as the hub reads it. The example is no row of anybody's data."""
    import yaml

    task = TASKS[recipe.data.task]
    known: dict[str, Any] = {"library_name": LIBRARIES[form], "base_model": recipe.model.name}
    known |= {"license": licence} if licence else {}
    known |= {"pipeline_tag": "sentence-similarity" if form == "sentence-transformers" else task}
    known |= {"tags": ["federated", "fedtune"], "widget": [EXAMPLES[task]] if task in EXAMPLES else []}
    if result and isinstance(result.get("federated"), float):
        figures = [{"type": result["metric"], "value": round(result["federated"], 4)}]
        set_ = {"name": recipe.data.source, "type": recipe.data.source}
        found = {"task": {"type": task}, "dataset": set_, "metrics": figures}
        known["model-index"] = [{"name": recipe.name or "federated", "results": [found]}]
    return str(yaml.safe_dump(known, sort_keys=False, allow_unicode=True)).rstrip()


def sizes(data: Mapping[str, Any]) -> list[str]:
    clients = [client["train"] for client in data["clients"]]
    return [
        f"- rows: {data['train']:,} that train at {len(clients)} clients ({min(clients):,} to "
        f"{max(clients):,} each), {data['test']:,} in the test set"
    ]


def privacy_lines(said: Sequence[str]) -> list[str]:
    """What a run says of its privacy; of a round before its last one, that holds all the more."""
    return [f"- differential privacy: {one}" for one in said] or [NO_PRIVACY]


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

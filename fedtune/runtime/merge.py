"""Finished LoRA adapters of one base become one, once, on the products B A: `fedtune merge`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedtune.aggregate import MERGES, ClientAdapter, Combined, Merge, split
from fedtune.aggregate import ranks as ranks_of
from fedtune.errors import FedtuneError
from fedtune.exports import check_target, whole_folder
from fedtune.runtime.folder import RunFolder, recipe_of
from fedtune.runtime.workspace import workspace_of

if TYPE_CHECKING:
    from fedtune.model.lora_files import Expert
    from fedtune.model.score import Score

SAME = {"selma": "mean", "greedy": "soup"}  # a user's word -> that of MERGES
EXACT = frozenset({"mean", "task"})  # these only weigh and add: the stacked factors hold the result
EQUAL = frozenset({"selma", "pcb"})  # weights do not count
Scorer = Callable[[Mapping[str, np.ndarray], int], "Score"]  # tensors at a rank -> how good


@dataclass(frozen=True)
class Asked:
    """How to merge: the rule, its options, a weight for each adapter (empty: 1), the rank of the result (0:
    the sum of ranks).

    base  the base of all adapters, whatever names they have for it; empty: their names
    home  where relative names of bases are meant from
    """

    by: str
    options: Mapping[str, str] = field(default_factory=dict)
    weights: Sequence[float] = ()
    rank: int = 0
    base: str = ""
    home: Path = Path()


@dataclass(frozen=True)
class Merged:
    """rank and what cutting to it lost, relative, over all and in the worst module; scores by name (base,
    adapters, merged); folders that were used;
    notes on what was brought together: names of one base, layers that some adapters lack."""

    rank: int
    error: float
    worst: tuple[str, float]
    scores: Mapping[str, Score]
    used: Sequence[Path]
    plain: int  # tensors that are no pairs: averaged
    notes: Sequence[str]


def merge_adapters(folders: Sequence[Path], asked: Asked, to: Path, run: RunFolder | None = None) -> Merged:
    """Read, merge, score on a run's test set if one is named, write a stock adapter with a card; the folder
    appears whole or not at all.

    Raises C102, C103 for what is asked, M304, M305, M306 for adapters that do not fit, R401.
    """
    target = check_target(to)
    check_asked(asked, len(folders), run)
    from fedtune.model.lora_files import read_expert, write_expert
    from fedtune.model.same_base import BaseName, check_fits, check_same, check_union, named
    from fedtune.model.union import aligned, settings_of

    merge = built(asked.by, asked.options, unscored)  # options are refused before the first file is read
    read = [read_expert(folder) for folder in folders]
    experts, notes = aligned(read)
    if asked.base:
        check_fits(read, BaseName(asked.base, "", asked.home))
    else:
        notes = [*check_same(read, asked.home), *notes]
        if len({expert.sha256 for expert in read}) > 1:
            check_union(read, named(read[0], asked.home))
    settings = settings_of(read, experts) | (
        {"base_model_name_or_path": asked.base, "revision": None} if asked.base else {}
    )
    scorer = scorer_of(experts[0], run) if run else None
    if scorer and asked.by == "greedy":
        merge = built(asked.by, asked.options, better(scorer))
    weights = asked.weights or [1.0] * len(experts)
    answers = [
        ClientAdapter(number, expert.tensors, weight)
        for number, (expert, weight) in enumerate(zip(experts, weights, strict=True))
    ]
    made = merge(answers, asked.rank or (0 if inner_of(asked) in EXACT else full_rank(experts)), 1.0)
    rank = max(ranks_of(made.tensors).values())
    scores = scored(scorer, experts, made.tensors, rank) if scorer else {}
    worst = max(made.layers.items(), key=lambda item: item[1])
    used = [e.path for n, e in enumerate(experts) if asked.by != "greedy" or f"kept/{n}" in made.report]
    merged = Merged(rank, made.report["error"], worst, scores, used, len(split(made.tensors)[1]), notes)
    with whole_folder(target) as temporary:
        write_expert(
            temporary, experts[0], settings, made.tensors, rank, card(asked, experts, weights, merged, run)
        )
    return merged


def check_asked(asked: Asked, count: int, run: RunFolder | None) -> None:
    """Raises C103 for arguments that do not go together, C102 for a rank below 1."""
    if count < 2:
        raise FedtuneError("C103", "one adapter to merge", "two or more", "give the folders of all")
    if asked.rank < 0:
        raise FedtuneError(
            "C102", f"--rank {asked.rank}", "1 or more", "correct it, or leave it out for the sum of ranks"
        )
    if asked.weights and (
        len(asked.weights) != count
        or asked.by in EQUAL
        or not all(0 < weight < float("inf") for weight in asked.weights)
    ):
        expected = (
            "no weights, because all adapters count equally"
            if asked.by in EQUAL
            else f"{count} positive numbers, one for each adapter"
        )
        raise FedtuneError(
            "C103",
            f"--weights {' '.join(f'{weight:g}' for weight in asked.weights)} with --by {asked.by}",
            expected,
            "correct --weights",
        )
    if asked.by == "greedy" and run is None:
        raise FedtuneError(
            "C103",
            "--by greedy without --eval",
            "a run whose test set can rank the adapters",
            "add --eval RUN",
        )


def inner_of(asked: Asked) -> str:
    """The rule that makes the result, below LiNeS or a soup."""
    return (
        str(asked.options.get("of", "mean"))
        if asked.by in ("lines", "greedy")
        else SAME.get(asked.by, asked.by)
    )


def built(by: str, options: Mapping[str, str], score: Callable[[Combined], float]) -> Merge:
    """The merge with its options; those that LiNeS and a soup do not know are for the merge that they follow
    (`of`). Raises C102, C103."""
    name = SAME.get(by, by)
    known = inspect.signature(MERGES[name]).parameters
    mine = {key: value for key, value in options.items() if key in known}
    others = {key: value for key, value in options.items() if key not in known}
    outer: dict[str, Any] = {
        key: number(key, value, str(known[key].annotation)) for key, value in mine.items() if key != "of"
    }
    if name in ("lines", "soup"):
        of = mine.get("of", "mean")
        if of not in MERGES or of in ("lines", "soup"):
            raise FedtuneError(
                "C103",
                f"--set of={of}",
                f"one of {', '.join(sorted(MERGES.keys() - {'lines', 'soup'}))}",
                "correct it",
            )
        outer["of"] = built(of, others, score)
    elif others:
        have = ", ".join(known) or "none"
        raise FedtuneError(
            "C103",
            f"--set {sorted(others)[0]} for {by}",
            f"one of its options ({have})",
            "correct or remove it",
        )
    missing = [
        key
        for key, parameter in known.items()
        if parameter.default is parameter.empty and key not in outer and key != "score"
    ]
    if missing:
        raise FedtuneError(
            "C103",
            f"{by} without {' and '.join(missing)}",
            " ".join(f"--set {key}=NUMBER" for key in missing),
            "add them",
        )
    return MERGES[name](score, **outer) if "score" in known else MERGES[name](**outer)


def number(key: str, value: str, kind: str) -> float:
    """Raises C103."""
    try:
        return int(value) if kind == "int" else float(value)
    except ValueError:
        raise FedtuneError(
            "C103", f"--set {key}={value}", "a whole number" if kind == "int" else "a number", "correct it"
        ) from None


def full_rank(experts: Sequence[Expert]) -> int:
    """The sum of ranks, as far as a module can have it; a pair of zeros has none."""
    sums: dict[str, int] = {}
    for expert in experts:
        for module, pair in split(expert.tensors)[0].items():
            rank = pair.rank if pair.A.any() or pair.B.any() else 0
            sums[module] = min(sums.get(module, 0) + rank, pair.B.shape[0], pair.A.shape[1])
    return max(1, *sums.values())


# --- scores ---


def scorer_of(like: Expert, run: RunFolder) -> Scorer:
    """Scores on the test set of a run. Raises M304 where its base is another one."""
    from fedtune.model.lora_files import seated
    from fedtune.model.score import score

    workspace = workspace_of(recipe_of(run), run.origin())
    return lambda tensors, rank: score(
        seated(workspace.base, like, tensors, rank), workspace.test(), workspace.recipe.evaluate.batch
    )


def better(scorer: Scorer) -> Callable[[Combined], float]:
    """A soup's score: the loss, the other way round."""
    return lambda made: -scorer(made.tensors, max(ranks_of(made.tensors).values())).loss


def unscored(made: Combined) -> float:
    raise RuntimeError("a score without a run")


def scored(
    scorer: Scorer, experts: Sequence[Expert], tensors: Mapping[str, np.ndarray], rank: int
) -> dict[str, Score]:
    """Of every adapter alone, of none, and of the merged one."""
    nothing = {name: np.zeros_like(value) if ".lora_" in name else value for name, value in tensors.items()}
    found = {"base, with what is no pair" if split(tensors)[1] else "base": scorer(nothing, rank)}
    for expert in experts:
        wide = MERGES["mean"]()(
            [ClientAdapter(0, expert.tensors)], 0, 1.0
        ).tensors  # one rank for all modules
        found[str(expert.path)] = scorer(wide, expert.rank)
    return found | {"merged": scorer(tensors, rank)}


# --- the card ---


def card(
    asked: Asked, experts: Sequence[Expert], weights: Sequence[float], merged: Merged, run: RunFolder | None
) -> str:
    """README.md: what was merged, how, and what it cost."""
    options = ", ".join(f"{key} = {value}" for key, value in asked.options.items())
    lines = [
        "---",
        "library_name: peft",
        f"base_model: {asked.base or experts[0].config.get('base_model_name_or_path', '')}",
        "tags: [fedtune, merged]",
        "---",
        "",
    ]
    lines += [f"# {len(merged.used)} LoRA adapters merged by {asked.by}", ""]
    lines += ["| adapter | SHA-256 of its tensors | weight |", "|---|---|---|"]
    lines += [
        f"| {e.path} | {e.sha256} | {weight:g} |"
        for e, weight in zip(experts, weights, strict=True)
        if e.path in merged.used
    ]
    lines += [
        "",
        f"- rule: {asked.by}{f' ({options})' if options else ''}, on the products B A",
        f"- rank {merged.rank}, alpha {merged.rank}: scale 1",
    ]
    lines += [f"- {sentence}" for sentence in cost(merged)]
    lines += (
        [
            f"- {name}: {score.name} {score.metric:.4f} on the test set of {run.path.name}"
            for name, score in merged.scores.items()
        ]
        if run
        else []
    )
    lines += (
        ["- the adapters were chosen by that test set, so the score of the merged one flatters"]
        if asked.by == "greedy"
        else []
    )
    return "\n".join([*lines, "- privacy: that of the adapters; merging adds none", ""])


def cost(merged: Merged) -> list[str]:
    """What the result does not hold, in words."""
    name, error = merged.worst
    said = [
        *merged.notes,
        f"cut to rank {merged.rank}: {100 * merged.error:.3g} % of the merged products' norm is lost, at "
        f"most {100 * error:.3g} % of a layer's ({name})",
    ]
    said += [f"{merged.plain} tensors that are no LoRA pairs were averaged"] if merged.plain else []
    return said

"""What differential privacy costs, and what it takes from a membership attack: 150 intents on a sentence
encoder.

    python simulations/privacy.py --set data.path=FOLDER [--what means head few] [--seeds 1 2 3]
    [--epsilons inf 8 3 1] [--validation] [--results FOLDER]

CLINC150 at five sites, epsilon of a row at delta 1e-5. `means`: the head of class means alone, in one question.
`head`: training of the head behind private class means.
`few`: a head that learns ten rows of a class by heart. The noise of class sums and of steps follows from epsilon.
The attack on `few` has as many rows that were trained on as others of the same file, and a shadow model of third
ones. Accuracy is that on six test rows a class; `--validation`: on as many of those that the settings here were
chosen by, with seed 11. Writes simulations/results/privacy.json and
privacy-attack.json, row by row.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from record import HERE, RESULTS, hardware

from fedtune.config import Recipe, method_of, read
from fedtune.methods.head_start import FEATURES
from fedtune.model.kept_front import behind_front
from fedtune.model.membership import auc, losses
from fedtune.model.score import score
from fedtune.privacy.accountant import by_renyi, counted, spent
from fedtune.privacy.noise import noisy
from fedtune.privacy.releases import Release
from fedtune.runtime.update_leak import Overheard
from fedtune.runtime.workspace import Workspace, workspace_of
from fedtune.types import Round, State, Tensors, Update

DELTA, CLIENTS, TESTED = 1e-5, 5, 6
SITES = [
    'partition={by = "iid", clients = 5}',
    "data.client_test_share=0.0",
    "evaluate.base=false",
    "evaluate.every=0",
    "method.head_start=means",
    "method.train.clip=0.0",
    "method.train.optimizer=sgd",
    "method.adapter.keep_front=true",
]
NORM = 1.0  # of a row's gradient


@dataclass(frozen=True)
class Plan:
    """What is trained behind the class means.

    name   in the table
    rows   training rows a class; 0: all
    share  of what may be told of a row, in 1 / noise^2, for the class sums
    rate   the probability with which a row is in a step
    rates  epsilon -> overrides
    """

    name: str
    adapter: tuple[str, ...]
    rows: int
    rounds: int
    steps: int
    share: float
    rate: float
    rates: dict[float, tuple[str, ...]]


HEAD = ("method.adapter.kind=head",)
PLANS = {
    "head": Plan("head, all rows", HEAD, 0, 3, 2, 0.5, 0.5, {
        math.inf: ("method.train.lr=15",), 8.0: ("method.train.lr=60",), 3.0: ("method.train.lr=40",), 1.0: ("method.train.lr=20",)}),
    "few": Plan("head, 10 rows a class", HEAD, 10, 3, 8, 0.5, 1.0, {
        math.inf: ("method.train.lr=50",), 8.0: ("method.train.lr=50",), 3.0: ("method.train.lr=50",), 1.0: ("method.train.lr=50",)}),
}  # fmt: skip


@contextmanager
def cut(sets: Sequence[str], start: int, rows: int, test: str) -> Iterator[list[str]]:
    """CLINC150's folder with so many training rows of each class (0: all), and other rows as test rows."""
    path = Path(next(one.partition("=")[2] for one in sets if one.startswith("data.path=")))
    whole = json.loads((path / "data_full.json").read_text())
    with tempfile.TemporaryDirectory() as folder:
        kept = {
            "train": some(whole["train"], start, rows),
            "test": some(whole["train"], start + rows, rows)
            if test == "train"
            else some(whole[test], 0, TESTED),
        }
        (Path(folder) / "data_full.json").write_text(json.dumps(kept))
        (Path(folder) / "domains.json").write_text((path / "domains.json").read_text())
        yield [*(one for one in sets if not one.startswith("data.path=")), f"data.path={folder}"]


def some(pairs: Sequence[list[str]], start: int, rows: int) -> list[list[str]]:
    """Of each class its rows from `start` on."""
    seen, kept = Counter[str](), []
    for text, label in pairs:
        if not rows or start <= seen[label] < start + rows:
            kept.append([text, label])
        seen[label] += 1
    return kept


def least(released: Callable[[float], list[Release]], epsilon: float) -> float:
    """About the smallest noise under which these releases stay below epsilon. Renyi divergences, which take
    milliseconds, bound it from above; loss distributions, which take seconds, from there."""

    def halved(low: float, high: float, fits: Callable[[float], bool], steps: int) -> float:
        for _ in range(steps):
            middle = math.sqrt(low * high)
            low, high = (low, middle) if fits(middle) else (middle, high)
        return high

    def by_renyi_fits(noise: float) -> bool:
        return by_renyi(frozenset(counted(released(noise)).items()), DELTA) <= epsilon

    most = halved(0.3, 100.0, by_renyi_fits, 12)
    return halved(0.7 * most, most, lambda noise: spent(released(noise), DELTA).epsilon <= epsilon, 5)


@cache
def noises(epsilon: float, share: float, rate: float, steps: int) -> tuple[float, float, float]:
    """Noise of the class sums, for their share, of the steps, for what is left, and epsilon of both."""
    if math.isinf(epsilon):
        return 0.0, 0.0, math.inf
    alone = least(lambda noise: [Release("gaussian", "example", noise)], epsilon) if share else 0.0
    head = [Release("gaussian", "example", alone / math.sqrt(share))] if share else []

    def both(noise: float) -> list[Release]:
        return [*head, *[Release("poisson-gaussian", "example", noise, rate, steps)] * (share < 1)]

    noise = least(both, epsilon) if share < 1 else 0.0
    return head[0].noise if head else 0.0, noise, spent(both(noise), DELTA).epsilon


class Told:
    """The sum of answers that came before, with as much noise as five sites would have laid on it."""

    def __init__(self, total: Update, noise: float) -> None:
        self.total = noisy(total, noise * math.sqrt(CLIENTS))

    def sum(self, verb: str, given: Tensors) -> Update:
        return self.total


def means(options: argparse.Namespace, keep: Any) -> None:
    """The sums are the same whatever the partition: they are asked once, and noise is drawn for each seed."""
    with cut(options.set, 0, 0, options.test) as here:
        recipe = read(str(HERE / "clinc150.toml"), [*SITES, *HEAD, "method.head_noise=0.0", *here])
        workspace, method = workspace_of(recipe), method_of(recipe)
        start, now = method.start(workspace.tunable), Round(1, 1, tuple(range(CLIENTS)))
        work = method.verbs[FEATURES].work
        answers = [work(workspace.client_with(client, {}), {}, now) for client in now.members]
        total = answers[0]
        for answer in answers[1:]:
            total += answer
        for epsilon in options.epsilons:
            noise, _, found = noises(epsilon, 1.0, 1.0, 0)
            for seed in options.seeds:
                state = method.begin(start, Told(total, noise))  # type: ignore[attr-defined]
                row = {"accuracy": accuracy(workspace, method, state), "epsilon": finite(found)}
                keep("class means, all rows", epsilon, seed, row | {"head_noise": noise})


def trained(plan: Plan, options: argparse.Namespace, keep: Any) -> None:
    for seed in options.seeds:
        with cut(options.set, 0, plan.rows, options.test) as here:
            place = planned(plan, seed, here)
            for epsilon in options.epsilons:
                began = time.process_time()
                head, steps, found = noises(epsilon, plan.share, plan.rate, plan.rounds * plan.steps)
                method, state = place.played(steps, [f"method.head_noise={head}", *plan.rates[epsilon]])
                keep(plan.name, epsilon, seed, {
                    "accuracy": accuracy(place.workspace, method, state), "epsilon": finite(found),
                    "head_noise": head, "noise_multiplier": steps,
                    "cpu_seconds": round(time.process_time() - began, 1)})  # fmt: skip


def planned(plan: Plan, seed: int, here: Sequence[str]) -> Place:
    train = [
        f"rounds={plan.rounds}",
        f"method.train.steps={plan.steps}",
        "method.train.batch=64",
        "method.train.lr=1.0",
    ]
    sets = [*SITES, *plan.adapter, *train, f"seed={seed}", "method.head_noise=0.0", *here]
    return Place("clinc150.toml", sets, plan.rate)


class Place:
    """A federation in this process, which may be played with noise of several sizes."""

    def __init__(self, recipe: str, sets: Sequence[str], rate: float) -> None:
        self.path, self.sets, self.rate = str(HERE / recipe), sets, rate
        self.workspace = workspace_of(self.recipe(0.0, ()))
        self.start = method_of(self.workspace.recipe).start(self.workspace.tunable)
        self.rows = {number: self.workspace.train(number) for number in self.workspace.names}

    def recipe(self, noise: float, more: Sequence[str]) -> Recipe:
        """Without noise, rows in a step by chance as well, and gradients of any length."""
        norm = NORM if noise else 1e9
        table = f"max_grad_norm = {norm}, noise_multiplier = {noise}, sample_rate = {self.rate}"
        return read(self.path, [*self.sets, f"method.train.private={{{table}}}", *more])

    def played(self, noise: float, more: Sequence[str]) -> tuple[Any, State]:
        recipe, state = self.recipe(noise, more), self.start
        method, members = method_of(recipe), tuple(self.rows)
        for number in range(1, recipe.rounds + 1):
            now = Round(number, recipe.seed, members)
            state = method.round(state, Overheard(self.workspace, recipe, now, self.rows, members), now)
        return method, state

    def losses(self, method: Any, state: State, data: Any) -> np.ndarray:
        """(rows,) of the model in this state."""
        method.install(state, self.workspace.tunable)
        return losses(self.workspace.tunable, behind_front(self.workspace.tunable, data))


def attacked(plan: Plan, options: argparse.Namespace, keep: Any) -> None:
    """Rows are ranked by their loss, and by how sure the model is of them beside a shadow model that saw neither
    them nor the others (as Carlini et al. 2022, arXiv:2112.03570, with one shadow)."""
    for seed in options.seeds:
        with (
            cut(options.set, 0, plan.rows, options.test) as here,
            cut(options.set, 0, plan.rows, "train") as unseen,
            cut(options.set, 2 * plan.rows, plan.rows, options.test) as elsewhere,
        ):
            place, other, shadow = (planned(plan, seed, one) for one in (here, unseen, elsewhere))
            asked = place.workspace.pooled(), other.workspace.test()
            for epsilon in options.epsilons:
                head, steps, found = noises(epsilon, plan.share, plan.rate, plan.rounds * plan.steps)
                more = [f"method.head_noise={head}", *plan.rates[epsilon]]
                mine, known = (one.played(steps, more) for one in (place, shadow))
                told = [place.losses(*mine, data) for data in asked]
                before = [shadow.losses(*known, data) for data in asked]
                surer = [sure(one) - sure(two) for one, two in zip(told, before, strict=True)]
                keep(plan.name, epsilon, seed, {
                    "accuracy": accuracy(place.workspace, *mine), "epsilon": finite(found),
                    "auc_loss": auc(-told[0], -told[1]), "auc": auc(*surer),
                    "head_noise": head, "noise_multiplier": steps})  # fmt: skip


def sure(found: np.ndarray) -> np.ndarray:
    """log p / (1 - p) of the right class, from its loss."""
    return -np.log(np.expm1(np.clip(found, 1e-12, 500.0)))


def accuracy(workspace: Workspace, method: Any, state: State) -> float:
    method.install(state, workspace.tunable)
    return score(workspace.tunable, workspace.test(), 64, workspace.front()).metric


def finite(epsilon: float) -> float | None:
    return None if math.isinf(epsilon) else epsilon


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--what", nargs="*", choices=("means", *PLANS), default=["means", *PLANS])
    parser.add_argument("--seeds", nargs="*", type=int, default=[1, 2, 3])
    parser.add_argument("--epsilons", nargs="*", type=float, default=[math.inf, 8.0, 3.0, 1.0])
    parser.add_argument("--validation", dest="test", action="store_const", const="val", default="test")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()

    def keep(what: str, epsilon: float, seed: int, found: dict[str, Any]) -> None:
        path = options.results / ("privacy-attack.json" if "auc" in found else "privacy.json")
        about = {"recipe": f"clinc150.toml, {CLIENTS} sites", "hardware": hardware(), "rows": {}}
        table = json.loads(path.read_text()) if path.exists() else about
        name = f"{what}, epsilon {epsilon:g}"
        table["rows"].setdefault(name, {})[str(seed)] = found
        path.write_text(json.dumps(table, indent=1, allow_nan=False) + "\n")
        print(name, seed, json.dumps(found), flush=True)

    for what in options.what:
        if what == "means":
            means(options, keep)
        else:
            (attacked if what == "few" else trained)(PLANS[what], options, keep)


if __name__ == "__main__":
    main()

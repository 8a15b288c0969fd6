"""A sweep from its plan to its table. Killed at any time, it goes on where it was: runs that are through are
read, one that was cut off is resumed."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedtune.config import Recipe
from fedtune.disk import json_text, write_atomic
from fedtune.errors import FedtuneError
from fedtune.events import Event, Progress, Said
from fedtune.sweeps.plan import Trial, fingerprint, recipe_of
from fedtune.sweeps.runner import Outcome, Runner, runner
from fedtune.sweeps.search import suggestions
from fedtune.sweeps.table import Row, as_csv, ranked

Tell = Callable[[Event], None]


@dataclass(frozen=True)
class Plan:
    """What is tried, and how.

    settings  of each trial of a grid; or
    samples   what each of `trials` trials draws, as `path=low..high`, and Optuna suggests
    seeds     of each trial, from the recipe's on
    halve     successive halving (Jamieson and Talwalkar 2016, arXiv:1502.07943): all trials run for a few
              rounds, the best 1/halve of them for `halve` times as many, and so on to the recipe's; 0: all
              run to the end
    """

    recipe: Recipe
    settings: Sequence[Mapping[str, Any]] = ()
    samples: Sequence[str] = ()
    trials: int = 0
    seeds: int = 1
    jobs: int = 1
    halve: int = 0

    def identity(self) -> str:
        what = {"settings": list(self.settings), "samples": list(self.samples), "trials": self.trials}
        return fingerprint(self.recipe, {**what, "seeds": self.seeds, "halve": self.halve})


@dataclass
class Sweep:
    """A sweep at work."""

    plan: Plan
    folder: Path
    tell: Tell
    runner: Runner
    rows: list[Row] = field(default_factory=list)

    def play(self, rows: Sequence[Row], rounds: int) -> None:
        """Run all seeds of some trials for so many rounds, and write the table after each run."""
        seeds = range(self.plan.recipe.seed, self.plan.recipe.seed + self.plan.seeds)
        pairs = [(row, seed) for row in rows for seed in seeds]
        work = []
        for row, seed in pairs:
            recipe = recipe_of(self.plan.recipe, row.trial, seed, rounds)
            text = json.dumps(recipe.model_dump(mode="json", exclude_unset=True))
            work.append((text, self.folder / "runs" / row.trial.run(seed)))
        self.tell(Progress("runs", 0, len(work)))
        for done, (number, outcome) in enumerate(self.runner.outcomes(work), 1):
            row, seed = pairs[number]
            row.outcomes[seed] = outcome
            self.tell(Said(said_of(row.trial, seed, outcome)))
            self.tell(Progress("runs", done, len(work)))
            self.write()

    def write(self) -> None:
        rows = ranked(self.rows)
        write_atomic(self.folder / "table.csv", as_csv(rows).encode())
        metric = next((row.metric for row in rows if row.metric), "")
        content = {"metric": metric, "rows": [row.values() for row in rows]}
        write_atomic(self.folder / "table.json", json_text(content, indent=2).encode() + b"\n")


def sweep(plan: Plan, folder: Path, tell: Tell) -> list[Row]:
    """Run or go on with a sweep; its rows, the best first. `tell` hears each run's result, and how many of
    them are through. Raises C104 (rounds that depend on their
    number, with halving), C107 (no Optuna), R406 (another sweep is in the folder), and what a recipe of it is
    refused with."""
    begin(plan, folder)
    with runner(plan.jobs) as made:
        work = Sweep(plan, folder, tell, made)
        if plan.trials:
            for trial, answer in suggestions(plan.samples, plan.trials, plan.recipe.seed):
                row = Row(trial)
                work.rows.append(row)
                work.play([row], 0)
                answer(row.worth)
        else:
            work.rows = [Row(Trial(number, one)) for number, one in enumerate(plan.settings, 1)]
            for row in work.rows:  # a mistake in the last of them shows before the first one runs
                recipe_of(plan.recipe, row.trial, plan.recipe.seed)
            staying = list(work.rows)
            for rounds, kept in rungs(plan.recipe.rounds, len(staying), plan.halve):
                staying = ranked(staying)[:kept] if kept < len(staying) else staying
                work.play(staying, rounds)
    return ranked(work.rows)


def results_to(on_run: Callable[[str], None] | None) -> Tell:
    """Who is told each run's result in a sentence, and nothing else."""

    def tell(event: Event) -> None:
        if on_run and isinstance(event, Said):
            on_run(event.text)

    return tell


def rungs(rounds: int, trials: int, eta: int) -> list[tuple[int, int]]:
    """Rounds and number of trials of each step of successive halving; without it, all of both.

    >>> rungs(9, 9, 3), rungs(10, 4, 2), rungs(5, 3, 0), rungs(1, 8, 2)
    ([(1, 9), (3, 3), (9, 1)], [(3, 4), (5, 2), (10, 1)], [(5, 3)], [(1, 8)])
    """
    if not eta:
        return [(rounds, trials)]
    steps = 0
    while eta ** (steps + 1) <= min(rounds, trials):
        steps += 1
    return [(math.ceil(rounds / eta ** (steps - n)), max(1, trials // eta**n)) for n in range(steps + 1)]


def begin(plan: Plan, folder: Path) -> None:
    """Say what is swept here, and refuse another sweep. Raises C104, R406."""
    if plan.halve and (found := plan.recipe.method.depends_on_rounds()):
        raise FedtuneError(
            "C104",
            f"--halve with {found[0]}",
            "rounds that do not depend on their number",
            "leave --halve out, or change the recipe",
        )
    file, identity = folder / "sweep.json", plan.identity()
    if file.exists():
        known = json.loads(file.read_text()).get("identity")
        if known != identity:
            raise FedtuneError(
                "R406", f"another sweep in '{folder}'", "the same recipe and plan", "choose another --to"
            )
        return
    write_atomic(file, json_text({"identity": identity, "seeds": plan.seeds}, indent=2).encode())


def said_of(trial: Trial, seed: int, outcome: Outcome) -> str:
    settings = ", ".join(f"{path} = {value}" for path, value in trial.settings.items()) or "the recipe"
    if outcome.error:
        return f"{settings}, seed {seed}: {outcome.error}"
    result = outcome.result
    value = result.get("federated")
    shown = f"{value:.4f}" if isinstance(value, float) else "no score"
    return f"{settings}, seed {seed}: {result['metric']} {shown} after {result['rounds']} rounds"

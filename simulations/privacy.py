"""What differential privacy costs, and what it takes from a membership attack: 150 intents on a sentence
encoder.

    python simulations/privacy.py --set data.path=FOLDER [--what means head lora] [--seeds 1 2 3]
    [--epsilons inf 8 3 1] [--rows 20] [--results FOLDER]

CLINC150 at five sites, epsilon of a row at delta 1e-5. `means`: the head of class means alone, of all rows, in
one question. `head`, `lora`: three rounds of training behind it, of `--rows` rows a class, with 70 % of epsilon
for the class sums; the noise of both follows from epsilon. Accuracy on six test rows a class; the attack looks
at the loss of the final model on as many rows that were trained on, and on as many that were not. Writes
simulations/results/privacy.json, row by row.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from record import HERE, RESULTS, hardware

from fedtune.config import Recipe, method_of, read
from fedtune.methods.head_start import FEATURES
from fedtune.model.membership import auc, losses
from fedtune.model.score import score
from fedtune.privacy.accountant import by_renyi, counted, spent
from fedtune.privacy.noise import noisy
from fedtune.privacy.releases import Release
from fedtune.runtime.checkpoints import load_state
from fedtune.runtime.folder import create
from fedtune.runtime.journal import Journal
from fedtune.runtime.run import run
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
]
ROUNDS, STEPS, RATE, SHARE = 3, 6, 0.1, 0.7
KINDS = {
    "head": ["method.adapter.kind=head", "method.train.lr=1e-3", "method.train.optimizer=adamw"],
    "lora": ["method.adapter.kind=lora", "method.train.lr=1e-3", "method.train.optimizer=adamw"],
}
NORM = 1.0  # of a row's gradient


@contextmanager
def cut(sets: Sequence[str], rows: int) -> Iterator[list[str]]:
    """CLINC150's folder with so many training rows a class (0: all), and TESTED test rows."""
    path = Path(next(one.partition("=")[2] for one in sets if one.startswith("data.path=")))
    whole = json.loads((path / "data_full.json").read_text())
    with tempfile.TemporaryDirectory() as folder:
        kept = {name: pairs for name, pairs in whole.items() if name not in ("train", "test")}
        kept |= {"train": first(whole["train"], rows), "test": first(whole["test"], TESTED)}
        (Path(folder) / "data_full.json").write_text(json.dumps(kept))
        (Path(folder) / "domains.json").write_text((path / "domains.json").read_text())
        yield [*(one for one in sets if not one.startswith("data.path=")), f"data.path={folder}"]


def first(pairs: Sequence[list[str]], most: int) -> list[list[str]]:
    """The first rows of each class."""
    seen, kept = Counter[str](), []
    for text, label in pairs:
        seen[label] += 1
        if not most or seen[label] <= most:
            kept.append([text, label])
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
    return halved(0.7 * most, most, lambda noise: spent(released(noise), DELTA).epsilon <= epsilon, 4)


def noises(epsilon: float, share: float) -> tuple[float, float]:
    """Noise of the class sums, for a share of epsilon, and of the steps, for what is left."""
    head = least(lambda noise: [Release("gaussian", "example", noise)], share * epsilon)
    if share == 1:
        return head, 0.0

    def both(noise: float) -> list[Release]:
        steps = Release("poisson-gaussian", "example", noise, RATE, ROUNDS * STEPS)
        return [Release("gaussian", "example", head), steps]

    return head, least(both, epsilon)


class Told:
    """The sum of answers that came before, with as much noise as five sites would have laid on it."""

    def __init__(self, total: Update, noise: float) -> None:
        self.total = noisy(total, noise * math.sqrt(CLIENTS))

    def sum(self, verb: str, given: Tensors) -> Update:
        return self.total


def means(sets: Sequence[str], seeds: Sequence[int], epsilons: Sequence[float], keep: Any) -> None:
    """The sums are the same whatever the partition: they are asked once, and noise is drawn for each seed."""
    with cut(sets, 0) as here:
        recipe = read(str(HERE / "clinc150.toml"), [*SITES, *KINDS["head"], "method.head_noise=0.0", *here])
        workspace, method = workspace_of(recipe), method_of(recipe)
        start, now = method.start(workspace.tunable), Round(1, 1, tuple(range(CLIENTS)))
        work = method.verbs[FEATURES].work
        answers = [work(workspace.client_with(client, {}), {}, now) for client in now.members]
        total = answers[0]
        for answer in answers[1:]:
            total += answer
        for epsilon in epsilons:
            noise = 0.0 if math.isinf(epsilon) else noises(epsilon, 1.0)[0]
            for seed in seeds:
                state = method.begin(start, Told(total, noise))  # type: ignore[attr-defined]
                keep(
                    "class means, all rows",
                    epsilon,
                    seed,
                    measured(workspace, method, state) | {"head_noise": noise},
                )


def trained(
    kind: str, sets: Sequence[str], rows: int, seeds: Sequence[int], epsilons: Sequence[float], keep: Any
) -> None:
    with cut(sets, rows) as here, tempfile.TemporaryDirectory() as runs:
        for epsilon in epsilons:
            head, steps = (0.0, 0.0) if math.isinf(epsilon) else noises(epsilon, SHARE)
            for seed in seeds:
                recipe = read(
                    str(HERE / "clinc150.toml"),
                    [*SITES, *KINDS[kind], *private(head, steps, rows), *here, f"seed={seed}", "name=run"],
                )
                folder = create(Path(runs), f"{kind}-{epsilon}-{seed}", "run")
                result = run(recipe, folder, lambda event: None)
                keep(f"{kind}, {rows} rows a class", epsilon, seed, told(recipe, folder) | {
                    "epsilon": result["epsilon"], "head_noise": head, "noise_multiplier": steps,
                    "seconds": result["seconds"]})  # fmt: skip


def private(head: float, steps: float, rows: int) -> list[str]:
    """As many rows a step as the private steps have on average, where there is no noise."""
    same = [f"rounds={ROUNDS}", f"method.train.steps={STEPS}"]
    if not head:
        return [*same, f"method.train.batch={max(round(RATE * rows * 150 / CLIENTS), 1)}"]
    table = f"max_grad_norm = {NORM}, noise_multiplier = {steps}, sample_rate = {RATE}"
    return [*same, "method.train.batch=32", f"method.train.private={{{table}}}", f"method.head_noise={head}"]


def told(recipe: Recipe, folder: Any) -> dict[str, float]:
    journal = Journal(folder.journal)
    last = journal.rounds()[-1]
    journal.close()
    workspace, method = workspace_of(recipe), method_of(recipe)
    method.start(workspace.tunable)
    return measured(workspace, method, load_state(folder, last.number, last.file_sha256)[0])


def measured(workspace: Workspace, method: Any, state: State) -> dict[str, float]:
    """Accuracy on the test rows, and the attack's AUC."""
    method.install(state, workspace.tunable)
    test = workspace.test()
    members = workspace.pooled()
    few = np.random.default_rng(0).permutation(len(members))[: len(test)].tolist()
    return {
        "accuracy": score(workspace.tunable, test).metric,
        "auc": auc(-losses(workspace.tunable, members.some(few)), -losses(workspace.tunable, test)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--what", nargs="*", choices=("means", *KINDS), default=["means", *KINDS])
    parser.add_argument("--seeds", nargs="*", type=int, default=[1, 2, 3])
    parser.add_argument("--epsilons", nargs="*", type=float, default=[math.inf, 8.0, 3.0, 1.0])
    parser.add_argument("--rows", type=int, default=20, help="training rows a class (default: 20)")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    path = options.results / "privacy.json"
    table: dict[str, Any] = (
        json.loads(path.read_text())
        if path.exists()
        else {"recipe": f"clinc150.toml, {CLIENTS} sites", "hardware": hardware(), "rows": {}}
    )

    def keep(what: str, epsilon: float, seed: int, found: dict[str, Any]) -> None:
        name = f"{what}, epsilon {epsilon:g}"
        table["rows"].setdefault(name, {})[str(seed)] = found
        path.write_text(json.dumps(table, indent=1, allow_nan=False) + "\n")
        print(name, seed, json.dumps(found), flush=True)

    for what in options.what:
        if what == "means":
            means(options.set, options.seeds, options.epsilons, keep)
        else:
            trained(what, options.set, options.rows, options.seeds, options.epsilons, keep)


if __name__ == "__main__":
    main()

"""DPO of fedtune against TRL's own DPOTrainer behind `fedtune.patch`: the same federation, pairs, start, steps and
rate, by two programs that share no line of the loss.

    python simulations/preference_trl.py --set model.name=FOLDER [--pairs 12] [--seeds 1 2 3] [--results FOLDER]

The recipe is preference.toml with SMALL's changes. Each client has so many pairs and a step takes all of them, so that
the order in which a program draws them makes no difference. TRL is given the tokens that fedtune has made of the rows,
since the two cut texts into tokens differently where prompt and response meet. Needs trl (tried: 1.16).
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from record import HERE, RESULTS, hardware

import fedtune
from fedtune.config import Recipe, read
from fedtune.events import Event, RoundDone, RoundStarted, Scored
from fedtune.model.encode import Encoded
from fedtune.model.objectives.base import IGNORED
from fedtune.model.score import score
from fedtune.quiet import quiet
from fedtune.runtime.workspace import workspace_of

SMALL = [
    "model.threads=1",
    "data.max_length=160",
    "rounds=3",
    "method.train.steps=4",
    "method.train.lr=5e-3",
]
TESTED = 15  # pairs of each client, on which nobody trains


@dataclass(frozen=True)
class Tuned:
    """losses: of training, of each round, weighed by pairs; accuracy and loss: of the pairs that nobody trains
    on; cpu_seconds: of the rounds alone."""

    losses: list[float]
    accuracy: float
    loss: float
    cpu_seconds: float


def kept_pairs(recipe: Recipe, pairs: int, folder: Path) -> list[str]:
    """Writes the first pairs of each client that no length cuts away, as train.jsonl and test.jsonl; overrides that
    read them."""
    column = recipe.partition.key_column
    made: dict[str, list[str]] = {"train": [], "test": []}
    seen: Counter[str] = Counter()
    workspace = workspace_of(recipe)
    for row in recipe.data.table().rows:
        number = seen[row[column]]
        if number < pairs + TESTED and len(workspace.encode("", [row], "pairs")):
            made["train" if number < pairs else "test"].append(json.dumps(row) + "\n")
            seen[row[column]] += 1
    for name, lines in made.items():
        (folder / f"{name}.jsonl").write_text("".join(lines))
    return [
        "data.source=jsonl",
        f"data.path={folder}",
        "data.client_test_share=0",
        f"method.train.batch={pairs}",
    ]


def by_fedtune(recipe: Recipe, runs: Path) -> Tuned:
    losses: list[float] = []
    times: list[float] = []
    final: list[Scored] = []

    def heard(event: Event) -> None:
        if isinstance(event, RoundStarted | RoundDone):
            times.append(time.process_time())
        if isinstance(event, RoundDone):
            losses.append(event.metrics["loss"])
        if isinstance(event, Scored) and event.phase == "federated":
            final.append(event)

    fedtune.simulate(recipe, runs=runs, on_event=heard)
    return Tuned(losses, final[-1].value, final[-1].loss, times[-1] - times[0])


def by_trl(recipe: Recipe, folder: Path) -> Tuned:
    """TRL's trainer with the recipe's model, adapter, rows and settings, as a script of a user's own."""
    import datasets
    import trl

    class Tokenised(trl.DPOTrainer):  # type: ignore[misc]
        """TRL's trainer with rows that are tokens already."""

        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset

    workspace, train = workspace_of(recipe), recipe.method.train
    tunable = workspace.tunable
    rows = [
        {**tokens, "client": workspace.names[number]}
        for number in workspace.names
        for tokens in as_trl_has_them(workspace.train(number))
    ]
    trainer = Tokenised(
        tunable.net,
        args=trl.DPOConfig(
            str(folder / "trl"), max_steps=train.steps, per_device_train_batch_size=train.batch, learning_rate=train.lr,
            lr_scheduler_type="constant", weight_decay=train.weight_decay, max_grad_norm=train.clip, beta=train.objective.beta,
            max_length=None, bf16=False, gradient_checkpointing=False, use_cpu=True, report_to="none", disable_tqdm=True,
            save_strategy="no", logging_strategy="no",
        ),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=workspace.base.tokenizer,
    )  # fmt: skip
    federated = fedtune.patch(
        trainer, rounds=recipe.rounds, partition={"by": "column", "column": "client"}, seed=recipe.seed
    )
    began = time.process_time()
    trainer.train()
    spent = time.process_time() - began
    found = score(tunable, workspace.test())
    return Tuned([record["loss"] for record in federated.history], found.metric, found.loss, spent)


def as_trl_has_them(encoded: Encoded) -> list[dict[str, list[int]]]:
    """Pairs as the lists of numbers that TRL makes of its rows."""
    made = []
    for example in encoded.examples:
        prompt = int((example["labels"] == IGNORED).sum())
        made.append(
            {
                "prompt_ids": example["input_ids"][:prompt].tolist(),
                "chosen_ids": example["input_ids"][prompt:].tolist(),
                "rejected_ids": example["rejected_input_ids"][prompt:].tolist(),
            }
        )
    return made


def compared(sets: list[str], pairs: int, seed: int) -> dict[str, dict[str, Any]]:
    """Both, on the same pairs."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        sets = [*SMALL, *sets, f"seed={seed}"]
        rows = kept_pairs(read(str(HERE / "preference.toml"), sets), pairs, folder)
        recipe = read(str(HERE / "preference.toml"), [*sets, *rows])
        ours, theirs = by_fedtune(recipe, folder / "runs"), by_trl(recipe, folder)
    return {
        name: {**vars(one), "first": one.losses[0], "last": one.losses[-1]}
        for name, one in (("fedtune", ours), ("TRL's DPOTrainer", theirs))
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument(
        "--pairs", type=int, default=12, help="of each client, all in every step (default: 12)"
    )
    parser.add_argument("--seeds", nargs="*", type=int, default=[1, 2, 3])
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="where the table is kept (default: simulations/results)"
    )
    options = parser.parse_args()
    quiet()
    rows: dict[str, dict[str, Any]] = {}
    for seed in options.seeds:
        for name, found in compared(options.set, options.pairs, seed).items():
            rows.setdefault(name, {})[str(seed)] = found
            print(seed, name, json.dumps(found), flush=True)
        table = {"recipe": "preference.toml", "pairs": options.pairs, "hardware": hardware(), "rows": rows}
        (options.results / "preference-trl.json").write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()

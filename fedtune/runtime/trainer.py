"""A Hugging Face Trainer of one's own in a simulated federation: its model, loss, collator, optimiser and
callbacks stay what they are; its training rows become clients'.

    trainer = Trainer(model=model, args=args, train_dataset=rows, data_collator=mine, compute_loss_func=mine)
    fedtune.patch(trainer, rounds=5, partition={"by": "dirichlet", "clients": 8, "column": "label"})
    trainer.train()

What a round is: every sampled client loads the shared tensors and runs the trainer's own `train()` on its
rows; the parameters that need gradients are averaged, weighed by rows (McMahan et al. 2017, arXiv:1602.05629,
algorithm 1).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from fedtune import config
from fedtune.aggregate.weighted_mean import WeightedMean
from fedtune.config import Recipe
from fedtune.errors import FedtuneError
from fedtune.rng import seed_of
from fedtune.runtime.sampling import sample

SEEDS = 2**31  # transformers' seeds are below 2**32, and accelerate adds to them


@dataclass
class Federated:
    """A trainer whose `train` is a federation.

    clients  names and numbers of rows of each
    history  a record a round: members, mean training loss, and what `evaluate` said of rows for it
    """

    trainer: Any
    recipe: Recipe
    train_alone: Callable[..., Any]
    clients: list[tuple[str, list[int]]]
    history: list[dict[str, Any]] = field(default_factory=list)

    def train(self, *arguments: Any, **named: Any) -> Any:
        """In the place of `Trainer.train`: all rounds. Returns the trainer's output of the last client, with
        the mean loss of the last round."""
        refuse_arguments(*arguments, *named.values())
        from fedtune.model.open_tensors import read_open, write_open

        shared, output = read_open(self.trainer.model), None
        for number in range(1, self.recipe.rounds + 1):
            members = sample(self.recipe.sampling, len(self.clients), self.recipe.seed, number)
            total, losses = WeightedMean(), WeightedMean()
            for client in members:
                write_open(self.trainer.model, shared)
                output = self.local(client, number)
                rows = float(len(self.clients[client][1]))
                total.add(read_open(self.trainer.model), rows)
                losses.add({"loss": output.training_loss}, rows)
            shared = total.mean()
            write_open(self.trainer.model, shared)
            self.told(number, members, float(losses.mean()["loss"]))
        assert output is not None
        return output._replace(training_loss=self.history[-1]["loss"])

    def local(self, client: int, number: int) -> Any:
        """One client's training, by the trainer itself, from its own draws."""
        from fedtune.hf.draws import own_draws

        seed = seed_of("trainer", self.recipe.seed, number, client) % SEEDS
        with on_rows(self.trainer, self.clients[client][1], seed), own_draws(seed, self.trainer.args.device):
            return self.train_alone()

    def told(self, number: int, members: Sequence[int], loss: float) -> None:
        record: dict[str, Any] = {"round": number, "members": list(members), "loss": loss}
        if self.trainer.eval_dataset is not None:
            record |= self.trainer.evaluate()
        self.history.append(record)


def patch(
    trainer: Any,
    *,
    rounds: int = 3,
    partition: Mapping[str, Any] | None = None,
    sampling: Mapping[str, Any] | None = None,
    seed: int = 1,
) -> Federated:
    """Let a trainer's `train` run a federation, simulated in this process; everything else of it stays.

    partition  as [partition] in a recipe; a `column` is one of the training rows'. Default: four equal shares
    sampling   as [sampling] in a recipe

    A schedule of the learning rate, warm-up and early stopping are each client's own and begin anew in every
    round; so does the optimiser. Raises C101 to C104, D204, D205.
    """
    tree = {
        "seed": seed,
        "rounds": rounds,
        "partition": dict(partition or {"by": "iid", "clients": 4}),
        "sampling": dict(sampling or {}),
    }
    recipe = config.parse(tree, "fedtune.patch")
    refuse(trainer)
    made = Federated(trainer, recipe, trainer.train, clients_of(recipe, trainer.train_dataset))
    trainer.train = made.train
    return made


def refuse_arguments(*given: Any) -> None:
    """Raises C104 for what `train` is told of a checkpoint or a trial."""
    if any(given):
        raise FedtuneError(
            "C104", "trainer.train with arguments", "none: a federation has no checkpoint", "leave them out"
        )


def refuse(trainer: Any) -> None:
    """Raises C104 for what a federation cannot keep."""
    rows, args = trainer.train_dataset, trainer.args
    found = ""
    if rows is None or not hasattr(rows, "__len__") or not hasattr(rows, "__getitem__"):
        found = "a trainer whose train_dataset cannot be divided"
    elif args.load_best_model_at_end:
        found = "load_best_model_at_end"
    elif trainer.optimizer is not None or trainer.lr_scheduler is not None:
        found = "an optimiser that was made before training"
    elif getattr(trainer.train, "__self__", trainer) is not trainer:
        found = "a trainer that is patched already"
    if found:
        expected = "rows that can be counted and chosen, and an optimiser that the trainer makes itself"
        raise FedtuneError(
            "C104", found, expected, "change the trainer, or name the optimiser in its arguments"
        )


def clients_of(recipe: Recipe, rows: Any) -> list[tuple[str, list[int]]]:
    """Raises D204 (no such column), D205 (too few rows)."""
    partition = recipe.partition
    column = partition.key_column or ("label" if hasattr(partition, "column") else "")
    keys = [str(key) for key in cells(rows, column)] if column else [""] * len(rows)
    counts = {key: keys.count(key) for key in dict.fromkeys(keys)} if partition.by_value else {}
    values = partition.values(counts) if partition.by_value else []
    if values:
        kept = [number for number, key in enumerate(keys) if key in values]
        groups = partition.groups([keys[number] for number in kept], recipe.seed, values)
        return [(name, [kept[number] for number in group]) for name, group in groups]
    made = partition.groups(keys, recipe.seed)
    for name, group in made:
        if len(group) < partition.min_rows:
            raise partition.too_few(name, len(group))
    return made


def cells(rows: Any, column: str) -> list[Any]:
    try:
        return [rows[number][column] for number in range(len(rows))]
    except (KeyError, TypeError, IndexError):
        raise FedtuneError(
            "D204",
            f"no column '{column}' in train_dataset",
            "the column that divides it",
            "set partition.column",
        ) from None


@contextmanager
def on_rows(trainer: Any, numbers: Sequence[int], seed: int) -> Iterator[None]:
    """The trainer with some of its rows, a seed of its own, and nothing that belongs to a whole training: no
    evaluation on the way and no checkpoints."""
    args, whole = trainer.args, trainer.train_dataset
    quiet: dict[str, Any] = {"seed": seed, "data_seed": seed, "eval_strategy": "no", "save_strategy": "no"}
    before = {name: getattr(args, name) for name in quiet}
    trainer.train_dataset = chosen(whole, numbers)
    trainer.optimizer = trainer.lr_scheduler = None
    try:
        for name, value in quiet.items():
            setattr(args, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(args, name, value)
        trainer.train_dataset = whole
        trainer.optimizer = trainer.lr_scheduler = None


def chosen(rows: Any, numbers: Sequence[int]) -> Any:
    """Some rows of a data set: its own kind where it can choose (datasets.Dataset), else a list."""
    return rows.select(list(numbers)) if hasattr(rows, "select") else [rows[number] for number in numbers]

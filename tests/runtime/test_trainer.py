"""A Trainer of one's own joins a federation with one line; its loss and collator are those that run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import transformers

import fedtune
from fedtune.errors import FedtuneError
from fedtune.hf.draws import own_draws
from fedtune.model.open_tensors import read_open
from fedtune.rng import seed_of
from fedtune.runtime.trainer import SEEDS
from tests import small

CLASSES = sorted(small.WORDS)


@pytest.fixture(scope="module")
def tokenizer(tiny_bert: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(tiny_bert)


@pytest.fixture
def made(tiny_bert: Path, tokenizer: Any, tmp_path: Path) -> Any:
    """A trainer with a loss and a collator that nobody else has; and how often each was called."""
    calls = {"loss": 0, "collator": 0}

    def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        calls["collator"] += 1
        batch = tokenizer([row["text"] for row in rows], padding=True, return_tensors="pt")
        return {**batch, "labels": torch.tensor([CLASSES.index(row["label"]) for row in rows])}

    def loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        calls["loss"] += 1
        return torch.nn.functional.cross_entropy(outputs.logits, labels, label_smoothing=0.2)

    def trainer(rows: list[dict[str, Any]], evaluated: Any = None, **more: Any) -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = transformers.AutoModelForSequenceClassification.from_pretrained(tiny_bert, num_labels=3)
        args = transformers.TrainingArguments(
            str(tmp_path / "out"), per_device_train_batch_size=4, max_steps=2, learning_rate=0.01, report_to="none",
            lr_scheduler_type="constant", remove_unused_columns=False, disable_tqdm=True, use_cpu=True, **more,
        )  # fmt: skip
        return transformers.Trainer(
            model, args, train_dataset=datasets.Dataset.from_list(rows), eval_dataset=evaluated,
            data_collator=collate, compute_loss_func=loss,
        )  # fmt: skip

    trainer.calls = calls  # type: ignore[attr-defined]
    return trainer


def alone(trainer: Any, seed: int) -> dict[str, np.ndarray]:
    """What plain training leaves, from the draws of one client."""
    trainer.args.seed = trainer.args.data_seed = seed
    with own_draws(seed):
        trainer.train()
    return read_open(trainer.model)


def test_one_client_and_one_round_is_plain_training(made: Any) -> None:
    rows = small.rows(24)
    seed = seed_of("trainer", 1, 1, 0) % SEEDS
    wanted = alone(made(rows), seed)
    trainer = made(rows)
    start = read_open(trainer.model)
    fedtune.patch(trainer, rounds=1, partition={"by": "iid", "clients": 1, "min_rows": 1})
    # the one client has the rows in their own order, as the plain training has them
    trainer.train()
    got = read_open(trainer.model)
    assert any((got[name] != start[name]).any() for name in got)
    assert all((got[name] == wanted[name]).all() for name in wanted)


@pytest.mark.thorough
def test_a_round_is_the_mean_of_its_clients(made: Any) -> None:
    rows = small.rows(30)
    trainer = made(rows)
    joined = fedtune.patch(trainer, rounds=1, partition={"by": "size", "clients": 2})
    parts = []
    for client, (_, numbers) in enumerate(joined.clients):
        one = made([rows[number] for number in numbers])
        parts.append((alone(one, seed_of("trainer", 1, 1, client) % SEEDS), len(numbers)))
    trainer.train()
    got, total = read_open(trainer.model), sum(count for _, count in parts)
    assert total == 30 and parts[0][1] != parts[1][1]
    for name, value in got.items():
        wanted = sum(part[name].astype(np.float64) * count for part, count in parts) / total
        np.testing.assert_array_equal(value, wanted.astype(np.float32))


@pytest.mark.thorough
def test_rounds_learn_and_the_trainer_stays_itself(made: Any) -> None:
    rows = small.rows(60)
    trainer = made(rows, datasets.Dataset.from_list(small.rows(30)), eval_strategy="steps")
    joined = fedtune.patch(
        trainer, rounds=6, partition={"by": "dirichlet", "clients": 3, "alpha": 5.0}, sampling={"count": 2}
    )
    said = trainer.train()
    losses = [one["eval_loss"] for one in joined.history]
    assert losses[-1] < losses[0] and said.training_loss == joined.history[-1]["loss"]
    assert all(len(one["members"]) == 2 for one in joined.history)
    assert made.calls["loss"] > 20 and made.calls["collator"] > 20
    assert len(trainer.train_dataset) == 60 and str(trainer.args.eval_strategy.value) == "steps"
    assert not (Path(trainer.args.output_dir) / "checkpoint-2").exists()


@pytest.mark.thorough
def test_the_same_seed_gives_the_same_bytes(made: Any) -> None:
    def run(seed: int) -> dict[str, np.ndarray]:
        trainer = made(small.rows(40))
        fedtune.patch(trainer, rounds=2, partition={"by": "column", "column": "site"}, seed=seed)
        torch.rand(seed)  # what happened before does not matter
        trainer.train()
        return read_open(trainer.model)

    one, same, other = run(1), run(1), run(2)
    assert all((one[name] == same[name]).all() for name in one)
    assert any((one[name] != other[name]).any() for name in one)


def test_an_adapter_of_peft_is_what_travels(made: Any) -> None:
    import peft

    trainer = made(small.rows(40))
    trainer.model = peft.get_peft_model(
        trainer.model, peft.LoraConfig(task_type="SEQ_CLS", r=2, lora_dropout=0.5)
    )
    trainer.model_wrapped = trainer.model
    before = {
        name: value.clone() for name, value in trainer.model.named_parameters() if not value.requires_grad
    }
    names = read_open(trainer.model).keys()
    assert all("lora_" in name or "modules_to_save" in name for name in names)
    fedtune.patch(trainer, rounds=1)
    trainer.train()
    after = dict(trainer.model.named_parameters())
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_mistakes_are_sentences(made: Any) -> None:
    trainer = made(small.rows(20))
    for partition, code in (
        ({"by": "column", "column": "nothing"}, "D204"),
        ({"by": "iid", "clients": 50}, "D205"),
        ({"by": "odd"}, "C102"),
    ):
        with pytest.raises(FedtuneError, match=code):
            fedtune.patch(trainer, partition=partition)
    fedtune.patch(trainer, rounds=1)
    with pytest.raises(FedtuneError, match="C104: found a trainer that is patched already"):
        fedtune.patch(trainer)
    with pytest.raises(FedtuneError, match=r"C104: found trainer\.train with arguments"):
        trainer.train(resume_from_checkpoint=True)
    stopped = made(small.rows(20), small.rows(5), eval_strategy="steps", save_strategy="steps",
                   load_best_model_at_end=True)  # fmt: skip
    with pytest.raises(FedtuneError, match="C104: found load_best_model_at_end"):
        fedtune.patch(stopped)

"""TRL's own trainers: what fedtune's DPO computes is what theirs computes, and they join a federation as they are.

Importing TRL costs half a minute of CPU, so all of it is here, slow."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import peft
import pytest
import torch
import transformers

import fedtune
from fedtune.model.base import load
from fedtune.model.encode import encode
from fedtune.model.objectives.dpo import Dpo
from fedtune.model.open_tensors import read_open
from fedtune.model.settings import ModelSettings
from fedtune.model.training_loss import TrainingLoss
from fedtune.model.tunable import attach
from tests import tiny
from tests.pages.blocks import blocks
from tests.tables import adapter_of

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("trl")]

SIMULATIONS = Path(__file__).parents[2] / "simulations"
WORDS = ("fox", "cat", "dog", "song", "rain", "boat", "hill", "sea", "book", "fire", "roof", "house")
ROWS = [
    {
        "prompt": f"what is a {word}",
        "chosen": f"the {word} is by the fire",
        "rejected": other,
        "client": f"{n % 2}",
    }
    for n, (word, other) in enumerate(zip(WORDS, WORDS[1:] + WORDS[:1], strict=True))
]


@pytest.fixture(scope="module")
def trl() -> Any:
    return pytest.importorskip("trl")  # not for everybody who collects this file: seconds


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.llama(tmp_path_factory.mktemp("llama") / "model", chat=False)


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(SIMULATIONS))
    return importlib.import_module("preference_trl")


def tokenizer_of(llama: Path) -> Any:
    found = transformers.AutoTokenizer.from_pretrained(llama)
    found.pad_token = found.eos_token
    return found


def settings(folder: Path, **more: Any) -> dict[str, Any]:
    quiet = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "use_cpu": True, "bf16": False}
    return {"output_dir": str(folder), "per_device_train_batch_size": 3, **quiet, **more}


def test_a_hand_batchs_loss_is_that_of_dpotrainer(llama: Path, trl: Any, script: Any, tmp_path: Path) -> None:
    base = load(ModelSettings(name=str(llama), device="cpu", threads=1), "preference", (), 1)
    tunable = attach(base, adapter_of(kind="lora", rank=2), 1)
    encoded = encode(ROWS, base, max_length=64)

    class Tokenised(trl.DPOTrainer):  # type: ignore[misc]
        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset

    rows = script.as_trl_has_them(encoded)
    trainer = Tokenised(
        tunable.net,
        args=trl.DPOConfig(**settings(tmp_path, beta=0.3, max_length=None, gradient_checkpointing=False)),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=base.tokenizer,
    )
    assert not any(".ref." in name for name in read_open(trainer.model))  # TRL's copy, which never travels
    draw = np.random.default_rng(5)  # after TRL has taken its reference, which is the adapter as it is then
    tunable.write({n: draw.normal(0, 0.3, v.shape).astype(np.float32) for n, v in tunable.read().items()})
    with torch.no_grad():
        theirs = trainer.compute_loss(trainer.model, trainer.data_collator(rows)).item()
        loss = TrainingLoss.of(Dpo(beta=0.3), tunable, encoded)
        ours = loss(tunable, encoded.collate(range(len(ROWS)))).item() / len(ROWS)
    assert abs(ours - np.log(2)) > 0.05
    assert ours == pytest.approx(theirs, rel=1e-5)


def test_a_federation_by_either_has_the_same_losses(llama: Path, script: Any, tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    rows = ["data.source=jsonl", f"data.path={tmp_path / 'pairs.jsonl'}", "partition.column=client"]
    found = script.compared([f"model.name={llama}", "data.max_length=64", "rounds=2", *rows], 4, seed=3)
    ours, theirs = found.values()
    assert len(ours["losses"]) == 2 and ours["losses"][1] < ours["losses"][0]
    assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-4)
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
    assert ours["accuracy"] == theirs["accuracy"]


def test_the_pages_trainer_joins_as_it_is(llama: Path, trl: Any, tmp_path: Path) -> None:
    (block,) = (one for one in blocks() if one.page == "docs/preference.md" and one.language == "python")
    more = {"max_steps": 2, "learning_rate": 0.01, "max_length": 64, "gradient_checkpointing": False}
    names: dict[str, Any] = {
        "DPOTrainer": trl.DPOTrainer,
        "LoraConfig": peft.LoraConfig,
        "fedtune": fedtune,
        "model": transformers.AutoModelForCausalLM.from_pretrained(llama),
        "args": trl.DPOConfig(**settings(tmp_path, **more)),
        "pairs": datasets.Dataset.from_list(ROWS),
        "tokenizer": tokenizer_of(llama),
    }
    exec(compile(block.text, str(block), "exec"), names)
    moved = [value for name, value in read_open(names["trainer"].model).items() if "lora_B" in name]
    assert moved and all(value.any() for value in moved)


def test_an_orpotrainer_joins_as_it_is(llama: Path, tmp_path: Path) -> None:
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    net = transformers.AutoModelForCausalLM.from_pretrained(llama)
    args = ORPOConfig(
        **settings(tmp_path, max_steps=2, learning_rate=0.01, max_length=64, gradient_checkpointing=False)
    )
    trainer = ORPOTrainer(
        net, args, train_dataset=datasets.Dataset.from_list(ROWS), processing_class=tokenizer_of(llama),
        peft_config=peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    )  # fmt: skip
    before = read_open(trainer.model)
    federated = fedtune.patch(trainer, rounds=2, partition={"by": "column", "column": "client"})
    trainer.train()
    after = read_open(trainer.model)
    assert [record["members"] for record in federated.history] == [[0, 1], [0, 1]]
    assert all(np.isfinite(record["loss"]) for record in federated.history)
    assert any((before[name] != after[name]).any() for name in before)
    assert json.dumps(federated.history)

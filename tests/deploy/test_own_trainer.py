"""A site's own training script, in a process of its own: what it trains is plain Trainer's, to the bit, and what does
not fit is a sentence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from fedtune.deploy import own_trainer
from fedtune.deploy.own_trainer import OwnTrainer, require_trainable
from fedtune.deploy.policy import Policy
from fedtune.errors import ClientFailed, Refused
from fedtune.hf.draws import own_draws
from fedtune.model.base import load
from fedtune.model.encode import encode
from fedtune.model.exchanged import exchanged, only_these
from fedtune.model.fit import fit
from fedtune.model.settings import ModelSettings, TrainSettings
from fedtune.model.tunable import TunableModel, attach, read
from fedtune.rng import seed_of
from fedtune.runtime.trainer import SEEDS
from fedtune.runtime.trainer_wire import PLACE, TOKEN
from tests import small, tiny
from tests.deploy import script
from tests.forked import Program
from tests.tables import adapter_of

WORD = "0123abcd"


def own(folder: Path) -> OwnTrainer:
    return OwnTrainer(folder / "trainer", WORD, Policy())


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.llama(tmp_path_factory.mktemp("llama") / "model")


@pytest.fixture
def tunable(llama: Path) -> TunableModel:
    base = load(ModelSettings(name=str(llama), device="cpu", threads=1), "causal-lm", (), 1)
    return attach(base, adapter_of(kind="lora", rank=2, alpha=4), 1)


@contextmanager
def running(model: Path, folder: Path, alpha: float = 4.0) -> Iterator[Program]:
    told = {PLACE: str(folder / "trainer"), TOKEN: WORD}
    process = Program("-c", script.text(model, alpha), cwd=folder, **told)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def test_a_round_is_plain_training_and_every_round_begins_where_it_is_told(
    llama: Path, tunable: TunableModel, tmp_path: Path
) -> None:
    """Of two factors one may rest, as under rule 'ffa': then it rests in the script, too."""
    trainer = own(tmp_path)
    rows = encode([{"text": "the rain falls on the roof"}], tunable.base, max_length=16)
    oracle, start = script.trainer(str(llama), str(tmp_path / "plain")), tunable.read()
    halves = [name for name in tunable.named if "lora_A" in name]
    with running(llama, tmp_path):
        for seed, still in ((3, []), (4, halves)):
            tunable.write(start)
            tunable.trainer = trainer.fit
            for name in still:
                tunable.named[name].requires_grad_(False)
            report = fit(tunable, rows, TrainSettings(), seed)
            named = exchanged(oracle.model, start)
            oracle.args.seed = oracle.args.data_seed = seed_of("trainer", seed) % SEEDS
            oracle.optimizer = oracle.lr_scheduler = None
            with only_these(named, still), own_draws(oracle.args.seed):
                said = oracle.train()
            want = read(named)
            assert all(np.array_equal(value, want[name]) for name, value in tunable.read().items())
            assert any(not np.array_equal(value, start[name]) for name, value in want.items())
            assert all(np.array_equal(want[name], start[name]) for name in still)
            assert (report.loss, report.steps, report.examples) == (said.training_loss, 2, len(script.ROWS))


@pytest.mark.parametrize(
    ("changed", "said"),
    [(8.0, r"scales its LoRA by \[4\.0\], expected the recipe's \[2\.0\]"), ("other", "answers otherwise")],
)
def test_another_model_is_noticed_before_anything_trains(
    changed: float | str, said: str, llama: Path, tunable: TunableModel, tmp_path: Path
) -> None:
    trainer, before, model, alpha = own(tmp_path), tunable.read(), llama, 4.0
    if isinstance(changed, float):
        alpha = changed
    else:
        other = transformers.AutoModelForCausalLM.from_pretrained(llama)
        with torch.no_grad():
            other.lm_head.weight.mul_(1.5)
        other.save_pretrained(tmp_path / "other")
        model = tmp_path / "other"
    refused = pytest.raises(ClientFailed, match=f"F503.*says no.*M304.*{said}")
    with running(model, tmp_path, alpha), refused:
        trainer.fit(tunable, None, TrainSettings(), 1)  # type: ignore[arg-type]
    assert not (tmp_path / "out.rounds").exists()
    assert all(np.array_equal(value, before[name]) for name, value in tunable.read().items())


def test_another_adapter_is_named(llama: Path, tmp_path: Path) -> None:
    base = load(ModelSettings(name=str(llama), device="cpu", threads=1), "causal-lm", (), 1)
    wider = attach(base, adapter_of(kind="lora", rank=4), 1)
    trainer = own(tmp_path)
    said = pytest.raises(ClientFailed, match=r"M305.*of shape \(2, 64\), in the recipe \(4, 64\)")
    with running(llama, tmp_path), said:
        trainer.fit(wider, None, TrainSettings(), 1)  # type: ignore[arg-type]


def test_a_script_that_is_not_there_costs_a_round_and_no_more(
    tunable: TunableModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own_trainer, "STARTING", 0.1)
    with pytest.raises(ClientFailed, match=r"F503.*not there, or ended while it trained.*trainer.log"):
        own(tmp_path).fit(tunable, None, TrainSettings(), 1)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"method": {"type": "fedkseed", "estimator": "spsa"}}, "'fedkseed'"),
        ({"method": {"type": "offsite", "adapter": {"kind": "lora"}}}, "'offsite'"),
        ({"aggregate": {"rule": "fedex"}}, "rule = 'fedex'.*residual"),
        ({"method__lora_start": "pissa"}, "lora_start = 'pissa'.*residual"),
        ({"method__train__private": {"max_grad_norm": 1.0}, "method__train__lr": 0.1}, "private"),
    ],
)
def test_what_a_script_cannot_keep_is_refused(changes: dict[str, Any], said: str, data: Path) -> None:
    with pytest.raises(Refused, match=f"F507.*{said}"):
        require_trainable(small.recipe(Path("bert"), data, **changes))
    require_trainable(small.recipe(Path("bert"), data))

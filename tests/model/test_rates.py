"""What lr = "auto" stands for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import fedtune
from fedtune.config import decided, parse
from fedtune.errors import FedtuneError
from fedtune.methods import METHODS
from fedtune.model.adapters import ADAPTERS
from fedtune.model.rates import RATES, WIDTH, with_rates
from fedtune.model.settings import CLIP, TrainSettings
from tests import small, tiny


@pytest.mark.parametrize("kind", sorted(ADAPTERS))
def test_every_kind_has_rates(kind: str) -> None:
    made = with_rates(TrainSettings(), RATES[kind], WIDTH)
    assert (made.optimizer, made.lr, made.head_lr) == (
        RATES[kind].optimizer,
        RATES[kind].lr,
        RATES[kind].head_lr,
    )
    assert not made.open and with_rates(made, RATES[kind], 64) == made


def test_rates_of_matrices_go_with_the_width_and_those_of_vectors_do_not() -> None:
    assert with_rates(TrainSettings(), RATES["lora"], 4 * WIDTH).lr == pytest.approx(RATES["lora"].lr / 4)
    assert with_rates(TrainSettings(), RATES["bias"], 4 * WIDTH).lr == RATES["bias"].lr


def test_a_head_that_starts_at_random_has_a_rate_of_its_own() -> None:
    assert with_rates(TrainSettings(), RATES["lora"], WIDTH, False).head_lr == RATES["lora"].fresh_head_lr


def test_a_rate_that_is_given_holds_for_the_head_too() -> None:
    made = with_rates(TrainSettings(lr=3e-4), RATES["head"], WIDTH)
    assert (made.optimizer, made.lr, made.head_lr) == ("adamw", 3e-4, 0.0)
    assert with_rates(TrainSettings(lr=3e-4, head_lr=1e-2), RATES["lora"], WIDTH).head_lr == 1e-2
    assert with_rates(TrainSettings(head_lr=1e-2), RATES["lora"], WIDTH).head_lr == 1e-2


def test_gradients_are_clipped_as_they_were_when_the_rates_were_found() -> None:
    private = {"max_grad_norm": 1.0}  # which bounds each row's gradient by itself
    for settings, longest in (
        ({}, CLIP),
        ({"lr": 0.1}, 0.0),
        ({"clip": 0.0}, 0.0),
        ({"private": private}, 0.0),
    ):
        train = TrainSettings.model_validate(settings)
        assert train.longest_gradient == with_rates(train, RATES["head"], WIDTH).clip == longest


@pytest.mark.parametrize("width", [32, 48])
def test_a_recipe_is_decided_by_its_models_width(tmp_path: Path, width: int) -> None:
    model = tiny.bert(tmp_path / "model")
    config = json.loads((model / "config.json").read_text()) | {"hidden_size": width}
    (model / "config.json").write_text(json.dumps(config))
    tree = small.tree(model, small.write_rows(tmp_path), method__train={"steps": 2, "batch": 4})
    train = decided(parse(tree)).method.train
    assert train.lr == pytest.approx(RATES["lora"].lr * WIDTH / width, rel=0.05)


def test_a_run_keeps_the_numbers_and_ends_with_their_bytes(tmp_path: Path) -> None:
    tree = small.tree(tiny.bert(tmp_path / "model"), small.write_rows(tmp_path), rounds=1)
    tree["method"]["train"] = {"steps": 2, "batch": 4}
    open_ = fedtune.simulate(tree, runs=tmp_path / "runs")
    train = json.loads((open_.folder / "config.json").read_text())["method"]["train"]
    assert train["optimizer"] == "adamw" and train["head_lr"] == RATES["lora"].fresh_head_lr
    assert train["lr"] == pytest.approx(RATES["lora"].lr * WIDTH / 32, rel=0.05)
    tree["method"]["train"] |= {key: train[key] for key in ("optimizer", "lr", "head_lr", "clip")}
    assert train["clip"] == 1.0
    assert fedtune.simulate(tree, runs=tmp_path / "runs").state_sha256 == open_.state_sha256


def test_an_optimiser_whose_rate_nobody_knows_is_refused(tmp_path: Path) -> None:
    tree = small.tree(Path("none"), tmp_path, method__train={"optimizer": "sgd", "steps": 2})
    with pytest.raises(FedtuneError, match=r"C104: .*'sgd' without method.train.lr"):
        parse(tree)


def test_what_would_fit_is_said_whatever_the_recipe_says() -> None:
    table = METHODS["fedkseed"].model_validate({"type": "fedkseed", "lr": 1.0, "train": {"lr": 9.0}})
    assert table.fitting_rates(WIDTH) == METHODS["fedkseed"](type="fedkseed").fitting_rates(WIDTH)
    assert "9.0" not in table.fitting_rates(WIDTH)

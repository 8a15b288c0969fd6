"""The step "private": bounded answers, noise where it is said, and recipes that could not keep the promise."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from fedtune.errors import FedtuneError
from fedtune.transforms import Chain, Transform, build
from fedtune.transforms.private import PrivateSettings
from fedtune.types import Client, Round, Update
from tests import small

NOW = Round(1, 0, (0, 1))
SITE = Client(0, "site", None, None)
VALUES = {"a": np.float32([[3.0, 0.0], [0.0, 0.0]]), "b": np.float32([4.0])}  # 5 long


def step(**fields: Any) -> Chain:
    return build([PrivateSettings(step="private", **fields)])


def test_a_long_answer_is_shortened_and_a_short_one_is_not() -> None:
    chain = step(clip=1.0)
    sent = chain.send(Update.of(VALUES, 3.0, {"loss": 2.0}), SITE, NOW)
    assert sent.tensors["b"] == pytest.approx(0.8) and sent.tensors["a"][0, 0] == pytest.approx(0.6)
    assert (sent.weight, dict(sent.metrics)) == (1.0, {})
    short = Update.of({"a": np.float32([0.5])})
    assert chain.send(short, SITE, NOW).tensors["a"].tolist() == [0.5]


def test_a_client_that_does_not_bound_its_answer_is_bounded_by_the_coordinator() -> None:
    """Whatever weight it claims: the sum changes by `clip` at most."""
    for weight in (1.0, 1e9, 1e-9):
        taken = step(clip=1.0).receive(Update.of(VALUES, weight, {"loss": 1.0}), 0, NOW)
        size = np.sqrt(sum(float(np.sum(value**2)) for value in taken.tensors.values()))
        assert size == pytest.approx(1.0) and taken.weight == 1.0 and not taken.metrics


def test_the_coordinator_does_not_touch_what_is_hidden_from_it() -> None:
    class Hidden(Transform):
        name, undone, hides = "mask", "sum", True  # type: ignore[misc]

    chain = Chain([*step(clip=1.0).steps, Hidden()])
    masked = Update({"a": np.full(4, 1e6)})
    assert chain.receive(masked, 0, NOW) is masked


@pytest.mark.parametrize("place", ["coordinator", "client"])
def test_the_noise_has_its_size_and_is_where_it_is_said(place: str) -> None:
    chain = step(clip=0.5, noise_multiplier=2.0, place=place)
    sent = chain.send(Update.of({"a": np.zeros(100_000, np.float32)}), SITE, NOW)
    taken = chain.receive(sent, 0, NOW)
    settled = chain.settle(taken, NOW).tensors["a"]
    assert bool(np.any(taken.tensors["a"])) is (place == "client")
    assert stats.kstest(settled, "norm", args=(0, 1.0)).pvalue > 1e-6


def test_without_bound_and_noise_the_value_itself_travels() -> None:
    near = {"a": np.float32([0.1])}
    state = Update.of({"a": np.float32([0.3])})
    chain = step(clip=0.0, noise_multiplier=0.0)
    sent = chain.send(state, SITE, NOW, near)
    assert sent.values()["a"].tobytes() == state.values()["a"].tobytes()
    assert chain.settle(sent, NOW, near).values()["a"].tobytes() == state.values()["a"].tobytes()
    assert step(clip=1.0).send(state, SITE, NOW, near).values()["a"] == pytest.approx([0.2])


def test_a_code_may_follow_and_the_decoded_answer_is_bounded_too() -> None:
    chain = build(
        [
            PrivateSettings(step="private", clip=1.0, noise_multiplier=0.0),
            small.config.Recipe.model_validate_json('{"chain": [{"step": "sign"}]}').chain[0],
        ]
    )
    draw = np.random.default_rng(0).laplace(size=500).astype(np.float32)
    client = Client(0, "site", type("M", (), {"base": type("B", (), {"fingerprint": "f"})}), None)
    for number in range(1, 5):  # error feedback grows what is sent
        sent = chain.send(Update.of({"a": draw}), client, replace(NOW, number=number))
        assert np.linalg.norm(chain.receive(sent, 0, NOW).tensors["a"]) <= 1 + 1e-9


PRIVATE = {"chain": [{"step": "private"}], "method__weight": "equal"}
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "noise without a bound": (
        {"chain": [{"step": "private", "clip": 0.0}]},
        "clip = 0 and noise_multiplier = 1.0",
    ),
    "twice": ({"chain": [{"step": "private"}] * 2}, "twice"),
    "weights": ({"method__weight": "rows"}, "method.weight = 'rows'"),
    "class sums": ({"method__head_start": "means"}, "the question 'features'"),
    "single answers": ({"aggregate": {"rule": "median"}}, "which reads single answers, beside 'private'"),
    "hidden states": (
        {"method": {"type": "sfprompt", "head_start": "random", "weight": "equal"}},
        "hidden states would leave unprotected",
    ),
    "a budget of nothing": ({"chain": [], "privacy": {"budget": 3.0}}, "with nothing that is private"),
    "after a code": ({"chain": [{"step": "sign"}, {"step": "private"}]}, "'private' after a step that gives"),
}


@pytest.mark.parametrize("name", WRONG)
def test_recipes_that_could_not_keep_the_promise_are_refused(name: str, tmp_path: Path) -> None:
    changes, words = WRONG[name]
    with pytest.raises(FedtuneError) as caught:
        small.recipe(tmp_path, tmp_path / "rows.jsonl", **(PRIVATE | changes))
    assert caught.value.code == "C104" and words in str(caught.value)


def test_a_language_model_has_no_class_sums_to_refuse(tmp_path: Path) -> None:
    small.recipe(
        tmp_path, tmp_path / "rows.jsonl", **PRIVATE, method__head_start="auto", data__task="causal-lm"
    )


def test_noise_at_the_clients_leaves_robust_rules_possible(tmp_path: Path) -> None:
    chain = [{"step": "private", "place": "client"}]
    small.recipe(
        tmp_path, tmp_path / "rows.jsonl", **PRIVATE | {"chain": chain}, aggregate={"rule": "median"}
    )

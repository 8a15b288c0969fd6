"""What an answer counts for, under every choice and method: what a client says, and who is told what it means."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, get_args

import pytest

from fedtune.config import method_of
from fedtune.events import ClientDone
from fedtune.methods.weights import TELLS, Weight, by_speed
from fedtune.runtime.exposure import exposure
from fedtune.transforms import build
from tests import small
from tests.marks import mostly_thorough

KSEED = {"type": "fedkseed", "size": 64, "estimator": "spsa", "steps": 2, "batch": 4, "lr": 1e-3}
METHODS: dict[str, dict[str, Any]] = {
    "fedpeft": {},
    "fedkseed": {"method": KSEED},
    "experts": {
        "method__type": "experts",
        "method__experts": {"by": "given", "groups": ["a", "a", "b", "b"], "warm_up": 1, "min_clients": 2},
    },
    "sfprompt": {"method": {"type": "sfprompt", "prompts": 2, "train": {"lr": 0.01, "steps": 2, "batch": 4}}},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.write_rows(tmp_path_factory.mktemp("rows"))


def test_every_choice_says_what_it_tells() -> None:
    assert TELLS.keys() == set(get_args(get_args(Weight)[0]))


def test_speed_is_its_formula() -> None:
    assert by_speed(0.7, None) == by_speed(0.0, 0.0) == by_speed(3.0, 3.0) == 1649  # 1000 exp(1 / 2)
    assert by_speed(0.6, 1.2) == round(1000 * math.exp(0.25)) and by_speed(0.0, 1.0) == 1000
    assert by_speed(50.0, 1.0) == by_speed(2.0, 1.0) == 2718  # one client never owns the mean
    assert by_speed(1.1, 1.0) > by_speed(0.9, 1.0)  # what falls slowly counts more


@pytest.mark.parametrize("name", mostly_thorough(METHODS, ["fedpeft"]))
def test_an_answer_weighs_what_the_recipe_says(
    name: str, tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    ends = set()
    for kind in TELLS:
        changes: dict[str, Any] = {**METHODS[name], "rounds": 2}
        changes["partition"] = {"by": "dirichlet", "clients": 4, "alpha": 1.0}
        changes |= {"data__client_test_share": 0.1}
        tree = small.tree(tiny_bert, data, **changes)
        tree["method"]["weight"] = kind
        recipe = small.config.parse(tree)
        _, result, events = small.play(recipe, tmp_path / kind)
        ends.add(result["state_sha256"])
        workspace, _ = small.workspace_of(recipe)
        told = [event for event in events if isinstance(event, ClientDone)]
        assert len(told) >= 8 and result["left_out"] == 0
        before: dict[int, float] = {}
        for event in told:
            if not event.metrics:
                continue  # another question than training
            mine = workspace.train(event.client)
            want = {"rows": len(mine), "tokens": mine.tokens, "equal": 1}.get(kind)
            if want is None:
                if "loss" not in event.metrics:
                    continue  # a second question of the round, with a client state of its own
                want = by_speed(event.metrics["loss"], before.get(event.client))
                before[event.client] = event.metrics["loss"]
            assert event.weight == pytest.approx(want, abs=1)
        table = exposure(method_of(recipe), build(recipe.chain), workspace.tunable)
        assert TELLS[kind] in next(row.sees for row in table if row.verb == "figures")
    assert len(ends) == len(TELLS) - 1  # every row has as many tokens


@pytest.mark.parametrize("rule", ["flexlora", "fedex"])
def test_rules_that_take_weights_take_these(rule: str, tiny_bert: Path, data: Path, tmp_path: Path) -> None:
    ends = {
        small.play(
            small.recipe(tiny_bert, data, rounds=2, aggregate={"rule": rule}, method__weight=kind),
            tmp_path / kind,
        )[1]["state_sha256"]
        for kind in ("equal", "loss-speed")
    }
    assert len(ends) == 2


def test_recipes_of_earlier_versions_say_examples(tiny_bert: Path, data: Path) -> None:
    assert small.recipe(tiny_bert, data, method__weight="examples") == small.recipe(tiny_bert, data)

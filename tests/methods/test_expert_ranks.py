"""Experts of different ranks: equal needs change no byte, others travel, are kept and exported at their rank."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedtune.errors import FedtuneError, Refused
from fedtune.experts.cards import cards
from fedtune.experts.need import allotted, at_rank, need
from fedtune.experts.state import OWN, below, experts_of, fresh
from fedtune.model.lora_files import read_expert
from fedtune.runtime import expert_library
from fedtune.runtime.check import check
from fedtune.runtime.checkpoints import load_state
from fedtune.runtime.client_half import respond
from fedtune.runtime.protocol import Ask
from fedtune.schema import Schema
from fedtune.types import Round
from fedtune.wire import EVERYONE, encode_state
from tests import small
from tests.small import HALVES

ONE_LABEL = {"by": "shards", "shards_per_client": 1, "clients": 6}
UNLIKE = {**HALVES, "groups": ["a", "a", "b", "b", "b", "b"], "rank": "auto"}  # of one label, of two


def recipe(model: Path, data: Path, by: dict[str, Any], **changes: Any) -> Any:
    return small.recipe(model, data, method__type="experts", method__experts=by, **changes)


def ranks_of(state: Any) -> dict[str, int]:
    return {
        name: next(v.shape[0] for key, v in tensors.items() if key.endswith("lora_A.weight"))
        for name, tensors in experts_of(state.shared).items()
    }


def test_groups_of_equal_needs_have_equal_ranks_and_not_a_byte_differs(
    tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    equal = small.play(recipe(tiny_bert, data, HALVES), tmp_path / "equal")[1]
    auto = small.play(recipe(tiny_bert, data, HALVES | {"rank": "auto"}), tmp_path / "auto")[1]
    assert auto["state_sha256"] == equal["state_sha256"]


@pytest.mark.thorough
def test_an_expert_has_the_rank_that_its_groups_first_sum_needs(
    tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    wide, longer = {"kind": "lora", "rank": 16}, {"lr": 0.02, "steps": 6, "batch": 4}
    more = {"partition": ONE_LABEL, "method__adapter": wide, "method__train": longer}
    equal = {key: value for key, value in UNLIKE.items() if key != "rank"}
    first = small.play(recipe(tiny_bert, data, equal, rounds=2, **more), tmp_path / "first")[0]
    needs = {name: need(found) for name, found in experts_of(load_state(first, 2, "")[0].shared).items()}
    made = recipe(tiny_bert, data, UNLIKE, **more)
    folder, result, events = small.play(made, tmp_path / "auto")
    state, _ = load_state(folder, 3, "")
    wanted = allotted(needs, 16)
    assert ranks_of(state) == wanted and wanted["a"] != wanted["b"] and sum(wanted.values()) == 32
    told = {
        key: value
        for event in events
        for key, value in getattr(event, "metrics", {}).items()
        if key.startswith("expert_rank/")
    }
    assert told == {f"expert_rank/{name}": rank for name, rank in wanted.items()}
    assert result["left_out"] == 0
    place = expert_library.library(folder)  # stock adapters, each at its own rank and the same scale
    for name, rank in wanted.items():
        config = json.loads((place / name / "adapter_config.json").read_text())
        assert config["r"] == rank == cards(place)[name].rank and config["lora_alpha"] / rank == 1
        tensors = read_expert(place / name).tensors
        for key, value in experts_of(state.shared)[name].items():
            np.testing.assert_allclose(tensors[key], value, rtol=1e-5)
    assert cards(place)["general"].rank == 16


def test_check_counts_the_memory_of_the_greatest_rank_and_refuses_frozen_factors(
    tiny_bert: Path, data: Path
) -> None:
    equal, auto = (
        sum(check(recipe(tiny_bert, data, HALVES | more)).memory.values()) for more in ({}, {"rank": "auto"})
    )
    assert auto > equal
    with pytest.raises(FedtuneError, match=r"C104.*rank = 'auto' with aggregate.rule = 'ffa'"):
        recipe(tiny_bert, data, UNLIKE, aggregate={"rule": "ffa"})


def test_a_client_takes_any_rank_that_the_recipe_allows_and_no_other(tiny_bert: Path, data: Path) -> None:
    workspace, link = small.workspace_of(recipe(tiny_bert, data, HALVES | {"rank": "auto"}))
    general, now = link.method.start(workspace.tunable).shared, Round(2, 3, (0, 1, 2, 3))

    def asked(rank: int) -> Any:
        given = {**general, **below(OWN, at_rank(fresh(general, 3), rank))}
        header = link.header("specialise", EVERYONE, now, Schema.of(given))
        return respond(
            link, workspace.client_with(0, {}), Ask(0, "specialise", now, encode_state(given, header))
        )

    for rank in (1, 2, 4):  # the adapter's is 2
        assert asked(rank).payload
    with pytest.raises(Refused, match=r"W60[36]"):
        asked(5)

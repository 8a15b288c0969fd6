"""Clients in one pass over the base, as a recipe asks for it: the run ends where it would have ended, up to the
order of sums."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedtune.errors import ClientFailed, FedtuneError
from fedtune.events import ClientLeftOut, Event, Progress, RoundDone
from fedtune.model import together
from fedtune.runtime.checkpoints import load_state
from fedtune.runtime.run import run
from fedtune.runtime.workers import workers_for
from fedtune.runtime.workspace import Workspace
from tests import small
from tests.marks import mostly_thorough

TRAIN = {"lr": 0.01, "steps": 2, "batch": 4}
THREE = {"method__train": {**TRAIN, "together": 3}}
OFFSITE = {
    "type": "offsite",
    "first": 1,
    "last": 0,
    "keep": 1.0,
    "bits": 4,
    "adapter": {"kind": "lora", "rank": 2},
    "train": TRAIN,
}
CHAIN = {"chain": [{"step": "quantize", "bits": 8}]}


def state_of(folder: Any) -> dict[str, np.ndarray]:
    return dict(load_state(folder, 3, "")[0].shared)


@pytest.mark.parametrize(
    "more",
    mostly_thorough(
        [
            {},
            CHAIN,
            {"aggregate": {"rule": "fedsa"}},
            {"aggregate": {"rule": "rolora"}},
            {"method__adapter": {"kind": "head"}},
            {"method": OFFSITE},
        ],
        [CHAIN, {"aggregate": {"rule": "rolora"}}],
    ),
    ids=["mean", "chain", "fedsa", "rolora", "head", "offsite"],
)
def test_a_run_ends_where_it_would_have_ended(
    more: dict[str, Any], tiny_bert: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups: list[int] = []
    real = together.fit_together

    def noted(tunable: Any, trainees: Any, *rest: Any, **more: Any) -> Any:
        groups.append(len(trainees))
        return real(tunable, trainees, *rest, **more)

    monkeypatch.setattr(together, "fit_together", noted)
    alone, one, told = small.play(small.recipe(tiny_bert, data, **more), tmp_path / "alone")
    assert not groups
    folder, result, events = small.play(
        small.recipe(tiny_bert, data, **{**more, **THREE}), tmp_path / "together"
    )
    assert groups == [3] * 3  # the fourth client of each round is alone
    assert [type(e) for e in events if not isinstance(e, Progress)] == [
        type(e) for e in told if not isinstance(e, Progress)
    ]
    assert result["up_bytes_per_client_round"] == pytest.approx(one["up_bytes_per_client_round"], rel=0.02)
    want = state_of(alone)
    moved = max(float(np.abs(value).max()) for value in want.values())
    for name, value in state_of(folder).items():
        np.testing.assert_allclose(
            value, want[name], atol=(0.02 if "chain" in more else 1e-4) * moved, err_msg=name
        )


def test_a_run_that_was_cut_goes_on(tiny_bert: Path, data: Path, tmp_path: Path) -> None:
    recipe = small.recipe(tiny_bert, data, **THREE)
    result = small.play(recipe, tmp_path / "whole")[1]

    def stop(event: Event) -> None:
        if isinstance(event, RoundDone) and event.round == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        small.play(recipe, tmp_path / "cut", tell=stop)
    again = run(recipe, small.RunFolder(tmp_path / "cut" / "run"), lambda event: None)
    assert again["state_sha256"] == result["state_sha256"]  # the groups of a whole round are the same


def test_a_client_that_fails_is_left_out_alone(
    tiny_bert: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = together.fit_together

    def one_breaks(tunable: Any, trainees: Any, *rest: Any, **more: Any) -> Any:
        broken = {name: np.full_like(value, np.nan) for name, value in trainees[1].start.items()}
        return real(
            tunable, [trainees[0], together.replace(trainees[1], start=broken), *trainees[2:]], *rest, **more
        )

    monkeypatch.setattr(together, "fit_together", one_breaks)
    _, result, events = small.play(small.recipe(tiny_bert, data, **THREE), tmp_path)
    dropped = [event for event in events if isinstance(event, ClientLeftOut)]
    assert result["left_out"] == 3
    assert {(event.client, event.code) for event in dropped} == {(1, "W607")}


def test_a_client_whose_rows_cannot_be_made_ready_is_left_out_alone(
    tiny_bert: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Workspace.train

    def nothing_left(self: Workspace, number: int) -> Any:
        if number == 1:
            raise ClientFailed("D209", "nothing", "something", "look at the rows")
        return real(self, number)

    monkeypatch.setattr(Workspace, "train", nothing_left)
    _, _, events = small.play(small.recipe(tiny_bert, data, **THREE), tmp_path)
    dropped = [event for event in events if isinstance(event, ClientLeftOut)]
    assert [(event.round, event.client, event.code) for event in dropped] == [
        (number, 1, "D209") for number in (1, 2, 3)
    ]


def test_workers_step_back(tiny_bert: Path, data: Path) -> None:
    recipe = small.recipe(tiny_bert, data, **THREE, model__threads=1)
    workspace, link = small.workspace_of(recipe)
    count, why = workers_for(recipe, workspace, link.method, 2)
    assert count == 1 and "method.train.together" in why


@pytest.mark.parametrize(
    ("more", "found"),
    [
        ({"aggregate": {"rule": "flora"}}, "aggregate.rule = 'flora'"),
        ({"aggregate": {"rule": "fedsb"}}, "aggregate.rule = 'fedsb'"),
        ({"method__adapter": {"kind": "prompt"}}, "method.adapter.kind = 'prompt'"),
        ({"method__adapter": {"kind": "lora", "dora": True}}, "method.adapter.kind = 'lora' as it is set"),
        (
            {"method__adapter": {"kind": "lora", "projected": True}, "aggregate": {"rule": "ffa"}},
            "method.adapter.kind = 'lora' as it is set",
        ),
        ({"method__adapter": {"kind": "lora", "slices": 2}}, "method.adapter.kind = 'lora' as it is set"),
        ({"method__lora_start": "pissa"}, "method.lora_start = 'pissa'"),
        ({"chain": [{"step": "mask"}]}, "'mask' in the chain"),
        (
            {"aggregate": {"rule": "flexlora"}, "method__lora_rank_by_client": [1, 2]},
            "clients of different ranks",
        ),
        ({"method__type": "experts"}, "method.type = 'experts'"),
    ],
    ids=["flora", "fedsb", "prompt", "dora", "projected", "slices", "start", "mask", "ranks", "experts"],
)
def test_what_cannot_go_together_is_refused_at_load(
    more: dict[str, Any], found: str, tiny_bert: Path, data: Path
) -> None:
    with pytest.raises(FedtuneError, match="C104") as refused:
        small.recipe(tiny_bert, data, **THREE, **more)
    assert f"method.train.together = 3 with {found}" in str(refused.value)

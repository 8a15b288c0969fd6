"""The best round's model is kept beside the last one: chosen on rows that are not reported, the same after any
crash and on every engine."""

from __future__ import annotations

import json
import math
import signal
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

import fedtune
from fedtune import api
from fedtune.config import Recipe
from fedtune.errors import FedtuneError
from fedtune.events import Noted, Scored
from fedtune.flower import server_app
from fedtune.runtime.best import best_round, stopping_round
from fedtune.runtime.finished import evaluate_run
from fedtune.runtime.folder import RunFolder, recipe_of
from fedtune.runtime.journal import Journal
from fedtune.runtime.run import run
from tests import small
from tests.e2e.test_flower_grid import FakeGrid
from tests.e2e.test_kill import DIE_IN
from tests.forked import Program

slow = pytest.mark.slow

FIVE: dict[str, Any] = {"rounds": 5, "evaluate__every": 1, "data__client_test_share": 0.3}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return small.write_rows(tmp_path)


def said(*values: float | None, metric: str = "accuracy") -> dict[int, dict[str, Any]]:
    return {number: {"metric": metric, "value": value} for number, value in enumerate(values, 1)}


def test_nan_is_never_best_and_ties_go_to_the_earlier_round() -> None:
    assert best_round(said(0.4, 0.6, 0.6)) == 2
    assert best_round(said(math.nan, 0.1, None)) == 2
    assert best_round(said(math.nan, None, math.inf)) is None
    assert best_round(said(9.0, 7.0, 7.0, math.nan, metric="perplexity")) == 2


@pytest.mark.parametrize(
    ("values", "patience", "least", "stops"),
    [
        ((0.1, 0.2, 0.2, 0.2), 2, 0.0, 4),
        ((0.1, 0.2, 0.2, 0.3), 2, 0.0, None),
        ((0.1, 0.3, 0.35, 0.38), 2, 0.1, 4),  # better, but by too little
        ((None, None), 2, 0.0, 2),  # nothing to hope for
        ((None, 0.1, 0.1), 2, 0.0, None),
        ((0.1, 0.0, 0.0, 0.0), 0, 0.0, None),
    ],
)
def test_patience(values: tuple[Any, ...], patience: int, least: float, stops: int | None) -> None:
    recipe = Recipe.model_validate({"stop": {"patience": patience, "min_delta": least}})
    assert stopping_round(recipe, said(*values)) == stops


def worse_after(monkeypatch: pytest.MonkeyPatch, best: int) -> None:
    """Let training spoil the model after a round: the rate turns its sign."""
    from fedtune.methods.fedpeft import FedPEFT

    honest = FedPEFT.round

    def round(self: Any, state: Any, cohort: Any, now: Any) -> Any:
        made = honest(self, state, cohort, now)
        if now.number > best:
            made = type(made)({name: -value for name, value in made.shared.items()}, made.kept)
        return made

    monkeypatch.setattr(FedPEFT, "round", round)


def test_the_best_round_is_left_and_the_last_beside_it(
    tiny_bert: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worse_after(monkeypatch, 3)
    folder, result, told = small.play(small.recipe(tiny_bert, data, **FIVE), tmp_path)
    scores = {e.round: e.value for e in told if isinstance(e, Scored) and e.phase == "held-out"}
    kept = result["kept_round"]
    assert kept == max(scores, key=lambda n: (scores[n], -n)) < 5 and len(scores) == 5
    assert result["best"]["of"] == "held-out rows" and result["rounds"] == 5
    assert {path.name for path in (folder.path / "state").iterdir()} == {
        f"round-{n:04d}.safetensors" for n in (kept, 5)
    }
    for which, number, own in (("best", kept, folder.adapter), ("last", 5, folder.last_adapter)):
        to = tmp_path / which
        api.export(folder.path, to, round=which)  # type: ignore[arg-type]
        mine, left = (load_file(place / "adapter_model.safetensors") for place in (to, own))
        assert all((mine[name] == left[name]).all() for name in left)
        for place in (to, own):
            assert f"after {number} rounds" in (place / "README.md").read_text()
            assert ("the best of those" in (place / "README.md").read_text()) == (which == "best")
        assert evaluate_run(folder, which)["round"] == number
    assert evaluate_run(folder)["value"] == result["federated"]
    assert evaluate_run(folder, "last")["value"] == result["federated_last"]
    best, last = (fedtune.load(folder.path, round=which)[0].state_dict() for which in ("best", "last"))
    assert any((best[name] != last[name]).any() for name in best)
    with pytest.raises(FedtuneError, match="best or last"):
        evaluate_run(folder, "worst")


def test_scoring_changes_no_state_and_stopping_ends_a_run_early(
    tiny_bert: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = small.play(small.recipe(tiny_bert, data, rounds=5, data__client_test_share=0.3), tmp_path / "0")[
        1
    ]
    assert plain["best"] is None and plain["kept_round"] == 5
    scored = small.play(small.recipe(tiny_bert, data, **FIVE, evaluate__rows=5), tmp_path / "1")[1]
    assert scored["state_sha256"] == plain["state_sha256"] and scored["best"]["rows"] == 5
    worse_after(monkeypatch, 2)
    recipe = small.recipe(tiny_bert, data, **{**FIVE, "rounds": 9}, stop={"patience": 2, "min_delta": 0.5})
    folder, result, told = small.play(recipe, tmp_path / "2")
    assert result["rounds"] == 3 and result["stopped_early"]
    assert any("stopped after round 3" in e.text for e in told if isinstance(e, Noted))
    again: list[Any] = []
    assert run(recipe, folder, again.append)["state_sha256"] == result["state_sha256"] and len(again) == 1
    with pytest.raises(FedtuneError, match=r"stop\.patience = 1 with evaluate\.every = 0"):
        small.recipe(tiny_bert, data, stop={"patience": 1})


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("place", "when"),
    [
        ("fedtune.runtime.best:scored", "calls == 2"),  # the round is committed, its score is not there
        pytest.param("fedtune.runtime.best:prune_states", "calls == 3", marks=slow),  # the score is there
        pytest.param("fedtune.runtime.run:leave", "True", marks=slow),  # chosen, and nothing is exported
    ],
)
def test_a_killed_run_chooses_the_same_round(
    place: str, when: str, tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    recipe = small.recipe(tiny_bert, data, **FIVE, evaluate__rows=7)
    folder, whole, _ = small.play(recipe, tmp_path)
    cut = RunFolder(tmp_path / "cut")
    (cut.path / "state").mkdir(parents=True)
    (cut.path / "config.json").write_bytes((folder.path / "config.json").read_bytes())
    module, _, name = place.partition(":")
    died = Program("-c", DIE_IN.format(module=module, name=name, when=when), str(cut.path)).finish()
    assert died.returncode == -signal.SIGKILL, died.stderr
    result = run(recipe_of(cut), cut, lambda event: None)
    for key in ("state_sha256", "kept_round", "best", "by_round", "federated"):
        assert result[key] == whole[key]
    journals = [Journal(place.journal) for place in (folder, cut)]
    assert journals[0].phases("round:") == journals[1].phases("round:")
    for journal in journals:
        journal.close()
    left = [load_file(place.adapter / "adapter_model.safetensors") for place in (folder, cut)]
    assert all((left[0][name] == left[1][name]).all() for name in left[0])


@pytest.mark.thorough
def test_every_engine_chooses_the_same_round(tiny_bert: Path, data: Path, tmp_path: Path) -> None:
    recipe = small.recipe(tiny_bert, data, **FIVE)
    here = small.play(recipe, tmp_path / "local")[1]
    grid = FakeGrid({90 + part: part for part in range(4)})

    def carry(link: Any, workspace: Any) -> Any:
        return server_app.flower_transport(grid, recipe, server_app.find_nodes(grid, 4, 5), seconds=5)

    there = small.play(recipe, tmp_path / "flower", carry=carry)[1]
    assert all(here[key] == there[key] for key in ("kept_round", "best", "by_round", "state_sha256"))


def test_every_clients_score_with_the_worst_and_the_spread(
    tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    folder, result, _ = small.play(small.recipe(tiny_bert, data, data__client_test_share=0.3), tmp_path)
    own = {name: one["metric"] for name, one in result["phases"]["clients_metric"].items()}
    each = json.loads((folder.path / "result.json").read_text())["per_client"]
    mean = sum(own.values()) / len(own)
    assert each["clients"] == len(own) == 4 and each["mean"] == pytest.approx(mean)
    assert each["worst"] == min(own.values()) == own[each["worst_client"]]
    assert each["spread"] == pytest.approx(math.sqrt(sum((v - mean) ** 2 for v in own.values()) / 4))

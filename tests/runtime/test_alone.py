"""What the federation is compared with: side by side or one after the other, once more after a crash, and for how
many examples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedtune import forks
from fedtune.events import Scored
from fedtune.methods.fedpeft import FedPEFT
from fedtune.model import fit as fits
from fedtune.runtime.folder import RunFolder
from fedtune.runtime.run import run
from tests import small
from tests.marks import mostly_thorough

COMPARED: dict[str, Any] = {
    "evaluate": {"local": True, "centralised": True, "base": True},
    "model__threads": 2,
}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return small.write_rows(tmp_path)


@pytest.mark.parametrize("kind", mostly_thorough(["lora", "head", "full"], ["head"]))
def test_side_by_side_they_are_what_they_are_one_after_the_other(
    kind: str, tiny_bert: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = small.recipe(tiny_bert, data, **COMPARED, method__adapter={"kind": kind})
    monkeypatch.setattr(forks, "can_fork", lambda: False)
    _, one, _ = small.play(recipe, tmp_path / "one")
    monkeypatch.setattr(forks, "can_fork", lambda: True)
    _, other, told = small.play(recipe, tmp_path / "other")
    for key in ("base", "local", "federated", "centralised"):
        assert other[key] == pytest.approx(one[key], abs=1e-6) and other["phases"]["loss"][
            key
        ] == pytest.approx(one["phases"]["loss"][key], rel=1e-4)
    assert one["state_sha256"] == other["state_sha256"]
    assert {e.phase for e in told if isinstance(e, Scored)} == {
        "base",
        "federated",
        "centralised",
        *(f"local:{n}" for n in range(4)),
    }


def test_the_one_place_sees_as_many_examples_as_the_federation(
    tiny_bert: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int]] = []
    honest = fits.fit

    def fit(tunable: Any, encoded: Any, *args: Any, **named: Any) -> Any:
        report = honest(tunable, encoded, *args, **named)
        seen.append((len(encoded), report.examples))
        return report

    monkeypatch.setattr(fits, "fit", fit)
    compared = {"evaluate": {"local": False, "centralised": True, "base": False}, "sampling": {"count": 2}}
    for train in ({"lr": 0.01, "steps": 2, "batch": 4}, {"lr": 0.01, "steps": 0, "epochs": 1, "batch": 4}):
        seen.clear()
        small.play(small.recipe(tiny_bert, data, **compared, method__train=train), tmp_path)
        *federated, (_, centralised) = seen
        asked = sum(examples for _, examples in federated)
        assert len(federated) == 6 and (centralised == asked if train["steps"] else centralised == 2 * asked)


@pytest.mark.thorough
def test_several_seeds_are_several_trainings_and_the_first_is_the_same(
    tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    compared = {"local": True, "centralised": True, "base": False}
    _, one, _ = small.play(small.recipe(tiny_bert, data, evaluate=compared), tmp_path)
    _, two, told = small.play(small.recipe(tiny_bert, data, evaluate={**compared, "seeds": 2}), tmp_path)
    losses = {e.phase: e.loss for e in told if isinstance(e, Scored)}
    assert one["phases"]["loss"]["centralised"] == losses["centralised"] != losses["centralised:seed2"]
    assert two["phases"]["loss"]["centralised"] == pytest.approx(
        (losses["centralised"] + losses["centralised:seed2"]) / 2
    )
    assert one["state_sha256"] == two["state_sha256"]


@pytest.mark.thorough
def test_what_was_scored_before_a_crash_is_not_scored_again(
    tiny_bert: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forks, "can_fork", lambda: False)
    recipe = small.recipe(tiny_bert, data, **COMPARED)
    whole = small.play(recipe, tmp_path / "whole")[1]

    def stop(event: Any) -> None:
        if isinstance(event, Scored) and event.phase == "local:1":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        small.play(recipe, tmp_path / "cut", stop)
    folder = RunFolder(tmp_path / "cut" / "run")
    trained: list[int] = []
    honest = FedPEFT.alone

    def alone(self: Any, tunable: Any, data: Any, *rest: Any) -> None:
        trained.append(len(data))
        honest(self, tunable, data, *rest)

    monkeypatch.setattr(FedPEFT, "alone", alone)
    result = run(recipe, folder, lambda event: None)
    assert len(trained) == 3 and all(result[key] == whole[key] for key in ("local", "centralised"))

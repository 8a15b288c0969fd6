"""How far single answers move the state: shortened to the running median, and each member's part."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedtune import config
from fedtune.errors import FedtuneError
from fedtune.events import Alarm, ClientDone, Contributed, Shortened
from fedtune.report.audit import audit_report
from fedtune.runtime.check import check, rows
from fedtune.runtime.moves import Parts, limit_of, shortened
from fedtune.runtime.run import run
from fedtune.types import Update, summed
from tests import small
from tests.hostile.poisoners import poisoned, sign_flip

GIVEN = {"w": np.float32([1.0, 1.0])}


def answer(x: float, weight: float = 2.0) -> Update:
    return Update.of({"w": np.float32([1.0 + x, 1.0])}, weight)


def cut_of(
    moves: Mapping[int, float], clip: float, medians: list[float]
) -> tuple[list[float], list[int], list[float]]:
    told: list[int] = []
    noted: list[float] = []
    made = shortened(
        [(client, answer(x)) for client, x in moves.items()],
        lambda client: GIVEN,
        clip,
        medians,
        lambda client, norm, limit: told.append(client),
        noted.append,
    )
    return [float(update.values()["w"][0]) - 1 for _, update in made], told, noted


def test_moves_are_shortened_to_the_first_rounds_median_and_then_to_the_running_one() -> None:
    assert cut_of({0: 1.0, 1: -2.0, 2: 30.0}, 2.0, []) == ([1.0, -2.0, 4.0], [2], [2.0])
    assert cut_of({0: 1.0, 1: -2.0}, 1.0, [9.0, 0.5, 0.5, 0.5, 0.25, 0.25]) == ([0.5, -0.5], [0, 1], [1.5])
    assert limit_of(3.0, [0.0]) == float("inf")


def test_a_part_is_what_the_mean_would_be_without_it() -> None:
    """Against the plain computation on the vectors themselves."""
    draw = np.random.default_rng(0)
    vectors, weights = draw.normal(size=(4, 2000)) + 1.0, [1.0, 2.0, 3.0, 4.0]
    vectors[3] *= -5
    parts = Parts(1)
    updates = [Update.of({"w": np.float32(v)}, w) for v, w in zip(vectors, weights, strict=True)]
    for client, update in enumerate(updates):
        parts.add(client, update, None)
    told = parts.told()
    total = summed(updates)
    assert total is not None
    mean = np.average(vectors, axis=0, weights=weights)
    for client, vector in enumerate(vectors):
        rest = [n for n in range(4) if n != client]
        others = np.average(vectors[rest], axis=0, weights=[weights[n] for n in rest])
        cosine = vector @ others / np.linalg.norm(vector) / np.linalg.norm(others)
        assert told[client]["norm"] == pytest.approx(np.linalg.norm(vector), rel=1e-5)
        assert told[client]["cosine"] == pytest.approx(cosine, abs=0.1)
        away = np.linalg.norm(mean - others) / np.linalg.norm(mean)
        assert told[client]["alone"] == pytest.approx(away, rel=0.1)
    assert Parts(1).told() == {}


@pytest.mark.parametrize("chain", [[], [{"step": "quantize", "bits": 8}]])
def test_who_turns_around_is_shortened_and_named(
    chain: list[dict[str, Any]], tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    recipe = small.recipe(
        tiny_bert, data, rounds=2, chain=chain, limits={"clip": 1.5}, watch={"influence": True}
    )
    folder, result, events = small.play(recipe, tmp_path, carry=poisoned(2, sign_flip(10.0)))
    cut = {(e.round, e.name) for e in events if isinstance(e, Shortened)}
    assert {(1, "client-2"), (2, "client-2")} <= cut and result["left_out"] == 0
    limits = [(e.norm, e.limit) for e in events if isinstance(e, Shortened) and e.name == "client-2"]
    assert all(norm > 3 * limit for norm, limit in limits)
    said = [e.text for e in events if isinstance(e, Alarm)]
    assert said and all("'client-2' moves the state against the others: cosine -" in text for text in said)
    assert "| client-2 | 2 | " in audit_report(folder).partition("contributed")[2]
    parts = [e.members for e in events if isinstance(e, Contributed)]
    assert all(
        part["client-2"]["cosine"] < min(p["cosine"] for n, p in part.items() if n != "client-2")
        for part in parts
    )


def test_a_killed_run_shortens_as_one_that_was_not(tiny_bert: Path, data: Path, tmp_path: Path) -> None:
    recipe = small.recipe(tiny_bert, data, limits={"clip": 0.7})

    def kill(event: Any) -> None:
        if isinstance(event, ClientDone) and (event.round, event.client) == (3, 1):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        small.play(recipe, tmp_path / "cut", tell=kill)
    again = run(recipe, small.RunFolder(tmp_path / "cut" / "run"), lambda event: None)
    _, whole, _ = small.play(recipe, tmp_path / "whole")
    assert again["state_sha256"] == whole["state_sha256"]


def test_a_chain_that_sends_values_is_shortened_as_no_chain_is(
    tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    """A move is how far an answer is from what was given, whether or not the chain sends differences."""
    idle = [{"step": "private", "place": "client", "clip": 0.0, "noise_multiplier": 0.0}]
    more = {"rounds": 2, "limits": {"clip": 0.7}, "method__weight": "equal"}
    plain, chained = (
        small.play(small.recipe(tiny_bert, data, chain=chain, **more), tmp_path / str(len(chain)))
        for chain in ([], idle)
    )
    assert chained[1]["state_sha256"] == plain[1]["state_sha256"]
    assert any(isinstance(event, Shortened) for event in chained[2])


@pytest.mark.parametrize("asked", [{"limits": {"clip": 2.0}}, {"watch": {"influence": True}}])
def test_what_a_mask_hides_cannot_be_looked_at(asked: dict[str, Any], tiny_bert: Path, data: Path) -> None:
    chain = [{"step": "ring", "clip": 0.1}, {"step": "mask"}]
    with pytest.raises(FedtuneError, match=r"C104: found .* which looks at single answers, beside"):
        config.parse(small.tree(tiny_bert, data, chain=chain, **asked))


def test_check_says_what_a_mask_makes_impossible(tiny_bert: Path, data: Path) -> None:
    masked = small.recipe(tiny_bert, data, chain=[{"step": "ring", "clip": 0.1}, {"step": "mask"}])
    said = [line for line in rows(check(masked)) if line.startswith("mask ")]
    assert len(said) == 1 and "limits.clip" in said[0] and "canaries" in said[0]
    assert not [line for line in rows(check(small.recipe(tiny_bert, data))) if line.startswith("mask ")]

"""fedtune leak-test on updates: what the attacks find where nothing protects, under masks, and under noise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedtune.cli import main
from fedtune.errors import FedtuneError
from fedtune.model import gradient_matching
from fedtune.rng import stream
from fedtune.runtime.update_leak import Leaks, Seen, sentences, update_leaks
from tests import small

SGD = {"optimizer": "sgd", "lr": 0.2, "steps": 4, "batch": 4}
MASK = {"chain": [{"step": "ring"}, {"step": "mask"}]}
LOUD = {"max_grad_norm": 0.1, "noise_multiplier": 100.0, "sample_rate": 0.5}
WORDS = [word for words in small.WORDS.values() for word in words.split()]


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of a dozen classes, each of one word over and over beside others."""
    draw = stream("leaking rows", 0)
    rows = [
        {"text": " ".join([WORDS[n % 12]] * 3 + draw.choice(WORDS, 2).tolist()), "label": f"class {n % 12}"}
        for n in draw.permutation(192).tolist()
    ]
    path = tmp_path_factory.mktemp("many") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def found(model: Path, data: Path, examples: int = 4, **changes: Any) -> Leaks:
    train = {"method__train": SGD, "method__head_start": "random"}
    return update_leaks(small.recipe(model, data, **train | changes), 0, examples)


def at(leaks: Leaks, place: str) -> Seen:
    return next(seen for seen in leaks.seen if seen.place == place)


def test_an_update_of_everything_tells_classes_words_and_members(tiny_bert: Path, many: Path) -> None:
    leaks = found(tiny_bert, many, method__adapter={"kind": "full"})
    bare, all_ = at(leaks, "without protection"), at(leaks, "to everybody")
    assert [seen.place for seen in leaks.seen] == ["without protection", "to everybody"]
    assert bare.classes and bare.classes.found == bare.classes.sought > 12 * bare.classes.chance / 4
    assert bare.words and bare.words.found == bare.words.sought and bare.words.chance < 0.5
    assert bare.update > 0.7 and bare.loss > 0.7 and all_.members == 4


def test_words_lie_in_what_lora_has_moved_by(tiny_bert: Path, many: Path) -> None:
    """One row, so that the directions of its words are few."""
    lora = {"kind": "lora", "rank": 8}
    leaks = found(tiny_bert, many, 2, method__adapter=lora, method__train=SGD | {"steps": 8, "lr": 1.0})
    words = at(leaks, "without protection").words
    assert words and "LoRA" in words.how and words.found / words.sought > 2 * words.chance


def test_a_mask_shows_the_sum_of_all(tiny_bert: Path, many: Path) -> None:
    leaks = found(tiny_bert, many, method__adapter={"kind": "full"}, **MASK)
    alone, summed = at(leaks, "without protection"), at(leaks, "to the coordinator")
    assert (alone.members, summed.members) == (1, 4)
    assert summed.update == at(leaks, "to everybody").update <= alone.update
    lines = sentences(leaks)
    assert "to the coordinator  (the sum of 4)" in lines[2] and "by chance" in lines[1]


def test_noise_leaves_the_attacks_what_chance_finds(tiny_bert: Path, many: Path) -> None:
    train = SGD | {"private": LOUD}
    leaks = found(tiny_bert, many, 8, method__train=train, method__adapter={"kind": "full"})
    bare, noisy = at(leaks, "without protection"), at(leaks, "to the coordinator")
    assert bare.update > 0.7 and abs(noisy.update - 0.5) < 4 * leaks.spread
    assert noisy.words and bare.words and noisy.words.found < bare.words.found == bare.words.sought


def test_a_step_at_the_coordinator_protects_from_everybody_else(tiny_bert: Path, many: Path) -> None:
    step = {"step": "private", "clip": 0.5, "noise_multiplier": 1000.0}
    leaks = found(tiny_bert, many, 8, chain=[step], method__weight="equal", method__adapter={"kind": "full"})
    seen, rest = at(leaks, "to the coordinator"), at(leaks, "to everybody")
    assert seen.words and seen.words.found == seen.words.sought and seen.update > 0.7
    assert rest.words and rest.words.found < rest.words.sought and abs(rest.update - 0.5) < 4 * leaks.spread


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_scalars_of_a_walk_can_be_asked_too(dtype: str, tiny_bert: Path, many: Path) -> None:
    walk = {"type": "fedkseed", "size": 64, "steps": 4, "batch": 4, "lr": 1e-3, "estimator": "spsa"}
    table = {"head_start": "random", "walk": "table"}
    leaks = found(tiny_bert, many, method=walk | table, method__train={}, model__dtype=dtype)
    assert 0 <= at(leaks, "without protection").update <= 1


def test_gradient_matching_says_what_it_takes_and_how_far_the_rows_themselves_agree(
    tiny_bert: Path, many: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exactly where one step is seen as it is, and no more under noise."""
    monkeypatch.setattr(gradient_matching, "NEAR", 1)
    one = SGD | {"steps": 1, "private": LOUD | {"sample_rate": 1.0}}
    table = {"method__train": one, "method__head_start": "random", "method__adapter": {"kind": "lora"}}
    told: list[str] = []
    leaks = update_leaks(small.recipe(tiny_bert, many, **table), 0, 2, steps=2, tell=told.append)
    assert told[0].startswith("gradient matching: 2 steps at 3 places, at most about ")
    bare, noisy = (at(leaks, place).matched for place in ("without protection", "to the coordinator"))
    assert bare and bare.truth == pytest.approx(1.0, abs=1e-3) and bare.words.sought > 2
    assert noisy and abs(noisy.truth) < 0.2
    assert (
        "by gradient matching" in sentences(leaks)[1] and "of the rows themselves 1.00" in sentences(leaks)[1]
    )


def test_scalars_of_a_walk_agree_with_the_rows_gradient(
    tiny_bert: Path, many: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """64 of some 300 directions, each with its derivative: a cosine near the root of that share."""
    monkeypatch.setattr(gradient_matching, "NEAR", 1)
    walk = {"type": "fedkseed", "size": 256, "steps": 64, "batch": 2, "lr": 1e-3, "estimator": "spsa"}
    space = {"space": "adapter", "adapter": {"kind": "bias"}, "head_start": "random"}
    recipe = small.recipe(tiny_bert, many, method=walk | space, method__train={})
    matched = at(update_leaks(recipe, 0, 2, steps=2, tell=lambda said: None), "without protection").matched
    assert matched and matched.truth > 0.2


def test_gradient_matching_wants_classes(tiny_bert: Path, many: Path) -> None:
    recipe = small.recipe(tiny_bert, many)
    other = recipe.model_copy(update={"data": recipe.data.model_copy(update={"task": "causal-lm"})})
    with pytest.raises(FedtuneError, match=r"leak-test --match with data\.task = 'causal-lm'"):
        update_leaks(other, 0, 4, steps=10)


@pytest.mark.parametrize("options", [{"client": 9}, {"client": 0, "examples": 1}])
def test_what_cannot_be_asked_is_said(options: dict[str, int], tiny_bert: Path, many: Path) -> None:
    with pytest.raises(FedtuneError, match="--client") as caught:
        update_leaks(small.recipe(tiny_bert, many), **{"examples": 4} | options)
    assert caught.value.code == "C103"


def test_pairs_have_no_loss_of_their_own_to_attack(tiny_bert: Path, many: Path) -> None:
    recipe = small.recipe(tiny_bert, many)
    pairs = recipe.model_copy(update={"data": recipe.data.model_copy(update={"task": "preference"})})
    with pytest.raises(FedtuneError, match=r"leak-test with data\.task = 'preference'"):
        update_leaks(pairs, 0, 4)


def test_the_command_prints_every_place(
    tiny_bert: Path, many: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = small.write_recipe(tmp_path / "r.toml", tiny_bert, many, **MASK)
    assert main(["leak-test", str(path), "--examples", "4"]) == 0
    told = capsys.readouterr().out
    assert told.count("membership AUC") == 3 and "only noise" in told

"""A site's policy, without a coordinator: what each line lets through and from where on it does not."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from fedtune.config import Recipe
from fedtune.deploy.policy import (
    Asked,
    Policy,
    examples_of,
    least_of,
    read_policy,
    reads_single,
    steps_for,
    within,
)
from fedtune.deploy.site_books import Sent, note_sent, sent_since
from fedtune.errors import FedtuneError
from tests import small

KEY, HASH = "0123456789abcdef", "a" * 64
SIGN = {"step": "sign", "error_feedback": False}


def of(model: Path, **changes: Any) -> Recipe:
    """fedpeft, LoRA, 2 steps of 4 rows, 3 rounds."""
    return small.recipe(model, Path("/data/x.jsonl"), **changes)


def asked(**more: Any) -> Asked:
    return Asked(**{"recipe": HASH, "budget": 100, "members": 3, "key": KEY, "sent": (10, 20), **more})


# line -> what it lets through, and what not: the policy, changes of the recipe, of what is asked
LINES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "coordinators": ({"coordinators": ("fff", KEY[:12])}, {"coordinators": ("f" * 12, KEY[:11])}, {}),
    "recipes": ({"recipes": ("b" * 64, HASH)}, {"recipes": ("b" * 64,)}, {}),
    "methods": ({"methods": ("x", "fedpeft")}, {"methods": ("x",)}, {}),
    "adapters": ({"adapters": ("x", "lora")}, {"adapters": ("x",)}, {}),
    "update_bytes": ({"update_bytes": 100}, {"update_bytes": 99}, {}),
    "scores": ({"scores": True}, {"scores": False}, {"verb": "score"}),
    "verbs": ({"verbs": ("x", "train")}, {"verbs": ("x",)}, {}),
    "min_members": ({"min_members": 3}, {"min_members": 4}, {}),
    "max_rounds": ({"max_rounds": 3}, {"max_rounds": 2}, {}),
    "min_examples": ({"min_examples": 8}, {"min_examples": 9}, {}),
    "min_steps": ({"min_steps": 2}, {"min_steps": 3}, {}),
    "min_batch": ({"min_batch": 4}, {"min_batch": 5}, {}),
    "answers_a_day": ({"answers_a_day": 3}, {"answers_a_day": 2}, {}),
    "bytes_a_day": ({"bytes_a_day": 130}, {"bytes_a_day": 129}, {}),
    "hours": ({"hours": "08-17"}, {"hours": "09-17"}, {"now": datetime(2026, 1, 1, 8)}),
}


@pytest.mark.parametrize("line", LINES)
def test_a_line_holds_from_where_it_says(line: str, tiny_bert: Path) -> None:
    lets, refuses, about = LINES[line]
    Policy(**lets).check(of(tiny_bert), asked(**about))
    with pytest.raises(FedtuneError, match=r"^F507"):
        Policy(**refuses).check(of(tiny_bert), asked(**about))


def test_only_approved_recipes(tiny_bert: Path) -> None:
    recipe = of(tiny_bert)
    policy = Policy(approved_only=True)
    for about in (asked(approved=frozenset({HASH})), Asked(approved=frozenset({recipe.fingerprint}))):
        policy.check(recipe, about)
    for about in (asked(), asked(approved=frozenset({"b" * 64})), Asked()):
        with pytest.raises(FedtuneError, match=r"F507.*nobody here has approved"):
            policy.check(recipe, about)
    Policy(recipes=(recipe.fingerprint,)).check(recipe, Asked())


def test_models_adapters_and_steps(tiny_bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tiny_bert.parent))
    for name in (str(tiny_bert), f"~/{tiny_bert.name}"):
        Policy(models=("x", name)).check(of(tiny_bert), asked())
    with pytest.raises(FedtuneError, match=r"F507.*base model"):
        Policy(models=("x",)).check(of(tiny_bert), asked())
    full = of(tiny_bert, method__adapter={"kind": "full"})
    Policy(adapters=("full",)).check(full, asked())
    with pytest.raises(FedtuneError, match=r"F507.*kind 'full'"):
        Policy(adapters=("lora",)).check(full, asked())
    signs = of(tiny_bert, chain=[SIGN])
    assert (steps_for(signs, "train"), steps_for(of(tiny_bert), "train")) == (["sign"], [])
    Policy(require=("sign",)).check(signs, asked())
    for policy in (Policy(require=("sign", "mask")), Policy(sums_only=True)):
        with pytest.raises(FedtuneError, match=r"^F507"):
            policy.check(signs, asked())


def test_only_sums(tiny_bert: Path) -> None:
    masked = of(tiny_bert, chain=[{"step": "ring"}, {"step": "mask"}])
    assert not reads_single(masked, "train") and not reads_single(masked, "nothing")
    Policy(sums_only=True).check(masked, asked())


def test_scores_are_of_held_out_rows_and_train_on_none(tiny_bert: Path) -> None:
    few = of(tiny_bert, method__train={"lr": 0.1, "steps": 1, "batch": 1})
    Policy(verbs=("features",), min_steps=9, min_batch=9).check(few, asked(verb="score"))
    with pytest.raises(FedtuneError, match=r"F507.*an update of 1 examples"):
        Policy().check(few, asked())


def test_rows_and_classes(tiny_bert: Path) -> None:
    recipe, policy = of(tiny_bert), Policy(min_rows=20, min_class_rows=3)
    policy.check_rows(recipe, 20)
    with pytest.raises(FedtuneError, match=r"F507.*19 rows that train"):
        policy.check_rows(recipe, 19)
    with pytest.raises(FedtuneError, match=r"F507.*an update of 8 examples"):
        Policy(min_examples=9).check_rows(recipe, 20)
    policy.check_classes("features", {"a": 3, "b": 9})
    policy.check_classes("features", {})
    policy.check_classes("train", {"a": 1})
    with pytest.raises(FedtuneError, match=r"F507.*a sum of 2 rows"):
        policy.check_classes("features", {"a": 2, "b": 9})


@pytest.mark.parametrize(
    ("rows", "steps", "batch", "word"),
    [
        (9, 3, 4, "9 rows"),
        (10, 2, 5, "2 steps"),
        (10, 5, 3, "3 batch"),
        (12, 2, 4, "8 examples"),
        (10, 3, 4, ""),
    ],
)
def test_what_a_script_has_trained_on(rows: int, steps: int, batch: int, word: str) -> None:
    policy = Policy(min_rows=10, min_examples=10, min_steps=3, min_batch=4)
    if not word:
        policy.check_trained(rows, steps, batch)
        return
    with pytest.raises(FedtuneError, match=f"F507.*{word} behind"):
        policy.check_trained(rows, steps, batch)


def test_hours_go_over_midnight() -> None:
    for hours, inside in (
        ("20-06", {20, 23, 0, 5}),
        ("08-17", {8, 16}),
        ("00-24", {0, 23}),
        ("09-09", {8, 9, 10}),
    ):
        edges = {0, 5, 6, 8, 9, 10, 16, 17, 19, 20, 23}
        assert {hour for hour in edges if within(hours, hour)} >= inside & edges
    assert not any(within("20-06", hour) for hour in (6, 19)) and not any(
        within("08-17", hour) for hour in (7, 17)
    )


def test_the_file(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    assert read_policy("") == Policy()
    path.write_bytes(b"\xef\xbb\xbfmin_rows = 9\nmax_norm = 1\nnoise = 0.5\nmethods = ['fedpeft']\n")
    assert read_policy(str(path)) == Policy(min_rows=9, max_norm=1.0, noise=0.5, methods=("fedpeft",))
    for content, code in (
        (b"min_rows = ", "C103"),
        (b"a = " + b"[" * 9000, "C103"),
        (b"\xff", "C105"),
        (b"min_row = 9", "C101"),
        (b"min_rows = 0", "C102"),
        (b"hours = '24-06'", "C102"),
        (b"delta = 1.0", "C102"),
        (b"noise = 1.0", "C104"),
    ):
        path.write_bytes(content)
        with pytest.raises(FedtuneError, match=f"^{code}"):
            read_policy(str(path))
    with pytest.raises(FedtuneError, match=r"C105.*none\.toml"):
        read_policy(str(tmp_path / "none.toml"))


def test_days_and_examples(tmp_path: Path, tiny_bert: Path) -> None:
    note_sent(tmp_path, Sent(100.0, 7))
    note_sent(tmp_path, Sent(200.0, 8))
    assert sent_since(tmp_path, 150.0) == (8,) and sent_since(tmp_path / "none", 0) == ()
    recipe = small.recipe(tiny_bert, tmp_path / "x.jsonl")
    assert examples_of(recipe, 120) == 8 and examples_of(recipe, 3) == 3
    epochs = small.recipe(
        tiny_bert, tmp_path / "x.jsonl", method__train={"steps": 0, "epochs": 2, "batch": 1, "lr": 0.1}
    )
    assert examples_of(epochs, 120) == 120


def test_rows_that_a_recipe_leaves_out_of_batches_do_not_count(tmp_path: Path, tiny_llama: Path) -> None:
    """Neither a choice within batches nor a curriculum makes an update of fewer rows than a site allows."""
    instruct = {"data__task": "instruct", "data__template": "plain"}

    def of(**train: Any) -> Any:
        ordered = {"select": [{"by": "pvi", "order": True}]} if "curriculum" in train else {}
        table = {"lr": 0.1, "steps": 4, "batch": 8, **train}
        return small.recipe(tiny_llama, tmp_path / "x.jsonl", **instruct, **ordered, method__train=table)

    chosen = of(uds={"keep": 0.25})
    assert examples_of(of(), 120) == 32 and examples_of(chosen, 120) == 8 and least_of(chosen, "batch") == 2
    assert examples_of(of(uds={"keep": 0.01}), 120) == 4
    assert examples_of(of(steps=0, epochs=1, uds={"keep": 0.25}), 120) == 30
    assert examples_of(of(curriculum={"start": 0.01}), 120) == 2
    assert examples_of(of(steps=0, epochs=1, curriculum={"start": 0.1}), 120) == 12
    assert least_of(of(), "batch") == 8 and least_of(of(), "steps") == 4

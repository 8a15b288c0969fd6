"""Who sees what, from declarations alone: each clause of a row stands for one of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fedtune import transforms
from fedtune.config import method_of
from fedtune.methods import Method, Verb
from fedtune.runtime.exposure import Exposure, beside, exposure, seen
from fedtune.runtime.task import chain_for, question_of
from fedtune.transforms.base import Chain
from tests import small

MASK = [{"step": "ring"}, {"step": "mask"}]


def method_and_chain(chain: list[dict[str, Any]]) -> tuple[Method, Chain]:
    recipe = small.recipe(Path("m"), Path("rows.jsonl"), chain=chain, method__weight="equal")
    return method_of(recipe), transforms.build(recipe.chain)


@pytest.fixture(scope="module")
def plain() -> Method:
    return method_and_chain([])[0]


def row(method: Method, steps: list[dict[str, Any]], **changes: Any) -> Exposure:
    """Of a verb with other declarations."""
    chain = method_and_chain(steps)[1]
    verb = replace(method.verbs["train"], **changes)
    return seen("train", verb, chain_for(verb, chain).bound(question_of("train", verb, method)))


def test_what_a_verb_declares_is_what_the_row_says(plain: Method) -> None:
    assert row(plain, []) == Exposure("train", "each client's answer as it passes, uses the sum only", ())
    groups = row(plain, [], by_group=True)
    assert groups.sees == "each client's answer as it passes, uses each group's sum only"
    assert row(plain, [], reads_each=True).sees == "each client's answer, and uses it singly"
    assert row(plain, [], shows="its size").sees.endswith("uses the sum only (its size)")
    masked = row(plain, MASK)
    assert masked.sees.startswith("the sum only") and masked.through == ("ring", "mask")
    assert row(plain, MASK, by_group=True).sees.startswith("each group's sum only")
    read = row(plain, MASK, reads_each=True)  # what only a sum undoes is left out, and hides nothing
    assert read.sees == "each client's answer, and uses it singly" and "mask" not in read.through


def test_what_steps_add_is_said_in_their_order(plain: Method) -> None:
    steps = [{"step": "private", "clip": 0.5, "noise_multiplier": 2.0}]
    found = row(plain, steps)
    assert found.through == ("private",)
    assert found.sees.startswith(
        "each client's answer as it passes, uses the sum only, cut to a length of 0.5"
    )


def test_what_leaves_a_client_beside_its_answers(plain: Method) -> None:
    clear = beside(plain, Chain())
    assert list(clear) == ["scores", "figures", "mistakes", "greeting"]
    assert "each client's sums" in clear["scores"] and "in the clear: its weight" in clear["figures"]
    assert f"({plain.facts.weight})" in clear["figures"]
    assert all(f", {name}" in clear["figures"] for name in plain.facts.metrics) and plain.facts.metrics
    hidden = beside(plain, method_and_chain(MASK)[1])
    assert list(hidden) == ["scores", "figures", "masks", "mistakes", "greeting"]
    assert (
        "all clients' sums" in hidden["scores"] and "as sums over members only: weight" in hidden["figures"]
    )
    assert "share of numbers that were cut" in hidden["figures"]
    assert "share of numbers that were cut" not in clear["figures"]
    private = beside(plain, method_and_chain([{"step": "private", "clip": 1.0, "noise_multiplier": 1.0}])[1])
    assert not any(f", {name}" in private["figures"] for name in plain.facts.metrics)


def test_rows_are_of_verbs_that_are_asked_and_of_all_else_that_leaves(plain: Method) -> None:
    train, chain = plain.verbs["train"], Chain()

    def rows(also: dict[str, str], **verbs: Verb) -> list[Exposure]:
        capabilities = replace(plain.capabilities, also_see=also)
        method: Any = SimpleNamespace(facts=plain.facts, verbs=verbs, capabilities=capabilities)
        return exposure(method, chain, None)

    never = replace(train, applies=lambda tunable: tunable is not None)
    others = list(beside(plain, chain))
    found = rows({"body": "all of it"}, train=train, never=never)
    assert [one.verb for one in found] == ["train", *others, "body"]
    assert found[0] == row(plain, []) and found[-1] == Exposure("body", "all of it", ())
    assert all(one.through == () for one in found[1:])
    assert [one.verb for one in rows({}, never=never)] == others

"""Clients of different ranks and scales: which rules a recipe allows for them, and by which laws."""

from __future__ import annotations

import numpy as np
import pytest

from fedtune.aggregate import RULES, ClientAdapter, Combined, Rule, split
from fedtune.schema import digest
from tests.aggregate.dense import SHAPES, adapter, apart, mean_product, near, products, run

SCALE, RANKS = 2.0, (4, 2, 1, 4, 2, 1, 2)
SCALES = {"one scale": (SCALE,) * 7, "alpha 8": tuple(8 / rank for rank in RANKS)}
BEFORE = Combined(adapter(4, 0))
MIXED = {name for name, rule in RULES.items() if rule.mixed}
PADDED = {"fair", "fedrot"}  # they average zero-padded factors

mixed_rule = pytest.mark.parametrize("name", sorted(MIXED))
own_scales = pytest.mark.parametrize("scales", SCALES.values(), ids=SCALES)


def holding(rule: Rule, tensors: dict[str, np.ndarray], scales: tuple[float, ...]) -> list[ClientAdapter]:
    """Seven clients that hold this adapter, each as the server would give it to them."""
    return [
        ClientAdapter(i, rule.for_rank(tensors, SCALE, rank, own), 1.0 + i, own)
        for i, (rank, own) in enumerate(zip(RANKS, scales, strict=True))
    ]


def trained(rule: Rule, scales: tuple[float, ...]) -> list[ClientAdapter]:
    return [
        ClientAdapter(a.client, near(a.tensors, 20 + a.client), a.weight, a.scale)
        for a in holding(rule, dict(BEFORE.tensors), scales)
    ]


def test_every_rule_is_allowed_or_refused_for_a_reason() -> None:
    assert {name for name, build in RULES.items() if not build().linear} == MIXED | PADDED


@mixed_rule
@own_scales
def test_one_product_at_many_ranks_is_that_product(name: str, scales: tuple[float, ...]) -> None:
    rule, one = RULES[name](), adapter(1, 5)
    made = run(rule, holding(rule, one, scales), BEFORE, SCALE)
    assert apart(products(made, SCALE), products(one, SCALE)) < 1e-6
    assert {pair.rank for pair in split(made.tensors)[0].values()} == {4}  # the server's


@pytest.mark.parametrize("name", sorted(PADDED))
def test_padded_factors_break_that_law(name: str) -> None:
    """By a thousandth (fair, whose ridge pulls back) to a tenth: should one of them keep it some day, it
    belongs into MIXED."""
    rule, one = RULES[name](), adapter(1, 5)
    assert (
        apart(
            products(run(rule, holding(rule, one, SCALES["alpha 8"]), BEFORE, SCALE), SCALE),
            products(one, SCALE),
        )
        > 1e-3
    )


@mixed_rule
@own_scales
def test_the_order_of_clients_does_not_matter(name: str, scales: tuple[float, ...]) -> None:
    rule = RULES[name]()
    answers = trained(rule, scales)
    there, back = run(rule, answers, BEFORE, SCALE), run(rule, answers[::-1], BEFORE, SCALE)
    assert apart(products(back, SCALE), products(there, SCALE)) < 1e-6
    assert digest(run(rule, trained(rule, scales), BEFORE, SCALE).tensors) == digest(there.tensors)


@mixed_rule
def test_scales_are_inside_the_products(name: str) -> None:
    """Twice the scale and half of B is the same client."""
    rule = RULES[name]()
    answers = trained(rule, SCALES["alpha 8"])
    other = [
        ClientAdapter(
            a.client,
            {n: v / np.float32(2) if "lora_B" in n else v for n, v in a.tensors.items()},
            a.weight,
            2 * a.scale,
        )
        if a.client % 2
        else a
        for a in answers
    ]
    assert (
        apart(
            products(run(rule, other, BEFORE, SCALE), SCALE),
            products(run(rule, answers, BEFORE, SCALE), SCALE),
        )
        < 1e-6
    )


@pytest.mark.parametrize(
    ("name", "options"), [*((name, {}) for name in sorted(MIXED)), ("hetlora", {"by": "padding"})]
)
def test_clients_of_the_smallest_rank_alone(name: str, options: dict[str, str]) -> None:
    """Nobody of the server's rank answers: the result still is of that rank, can be given to anybody, and
    every slice of it can be trained."""
    rule = RULES[name](**options)
    small = [
        ClientAdapter(i, near(rule.for_rank(BEFORE.tensors, SCALE, 1, 8.0), i), 1.0 + i, 8.0)
        for i in range(5)
    ]
    made = run(rule, small, BEFORE, SCALE)
    for rank in (1, 2, 4):
        for pair in split(rule.for_rank(made.tensors, SCALE, rank, 8 / rank))[0].values():
            assert pair.rank == rank and (np.abs(pair.A).sum(axis=1) + np.abs(pair.B).sum(axis=0) > 0).all()


@own_scales
def test_the_median_is_that_of_dense_products_cut_to_rank(scales: tuple[float, ...]) -> None:
    rule = RULES["median"]()
    answers = trained(rule, scales)
    made = products(run(rule, answers, BEFORE, SCALE), SCALE)
    for module in SHAPES:
        u, s, vt = np.linalg.svd(
            np.median([products(a.tensors, a.scale)[module] for a in answers], axis=0), full_matrices=False
        )
        np.testing.assert_allclose(made[module], (u[:, :4] * s[:4]) @ vt[:4], atol=1e-5 * s[0])


@own_scales
def test_krum_leaves_out_the_liar_of_any_rank(scales: tuple[float, ...]) -> None:
    for liar in range(3):  # of rank 4, 2, 1
        rule = RULES["krum"](faulty=1)
        answers = holding(rule, adapter(1, 5), scales)
        answers[liar] = ClientAdapter(
            liar,
            {n: -10 * v if "lora_B" in n else v for n, v in answers[liar].tensors.items()},
            1.0,
            answers[liar].scale,
        )
        assert (
            apart(products(run(rule, answers, BEFORE, SCALE), SCALE), products(adapter(1, 5), SCALE)) < 1e-6
        )


@own_scales
def test_fedex_carries_what_padding_gets_wrong(scales: tuple[float, ...]) -> None:
    """Adapter and residual together are the mean of products, however much the factors are off."""
    answers = trained(RULES["fedex"](), scales)
    made = run(RULES["fedex"](), answers, BEFORE, SCALE)
    assert apart(products(made, SCALE), mean_product(answers)) < 1e-6
    assert apart(products(made.tensors, SCALE), mean_product(answers)) > 0.1

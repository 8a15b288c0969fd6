"""Rules that bear wrong answers: against naive twins, and against two of ten clients that send ten times the
opposite."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from fedtune.aggregate import RULES, ClientAdapter, Combined
from fedtune.aggregate.elementwise import BLOCK
from fedtune.aggregate.single_answers import hold, squares
from tests.aggregate.dense import SHAPES, adapter, apart, mean_product, near, products, run

SCALE = 2.0
BEFORE = Combined(adapter(4, 0))
ANSWERS = [ClientAdapter(i, near(BEFORE.tensors, i), 1.0 + i, SCALE) for i in range(7)]


def cut(matrix: np.ndarray, rank: int = 4) -> np.ndarray:
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


@pytest.mark.parametrize("block", [BLOCK, 100], ids=["one block", "row by row"])
@pytest.mark.parametrize(
    ("rule", "across"),
    [
        ("median", lambda x: np.median(x, axis=0)),
        ("trimmed", lambda x: np.sort(x, axis=0)[1:-1].mean(axis=0)),
    ],
)
def test_entries_of_products(rule: str, across: object, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedtune.aggregate.elementwise.BLOCK", block)
    made = run(RULES[rule](), ANSWERS, BEFORE, SCALE)
    each = [products(a.tensors, SCALE) for a in ANSWERS]
    wanted = {module: cut(across(np.stack([own[module] for own in each]))) for module in SHAPES}  # type: ignore[operator]
    assert apart(products(made, SCALE), wanted) < 1e-6
    for name in ("head.bias", "temperature"):
        np.testing.assert_allclose(
            made.tensors[name], across(np.stack([a.tensors[name] for a in ANSWERS])), rtol=1e-6
        )  # type: ignore[operator]


def test_trimming_by_hand() -> None:
    """Of 0, 1, 2, 3, 100 a fifth at either end goes: (1 + 2 + 3) / 3 = 2; the median is 2 as well; the mean
    would be 21.2."""
    start = Combined({"w": np.zeros(1, np.float32)})
    answers = [
        ClientAdapter(i, {"w": np.full(1, value, np.float32)}) for i, value in enumerate((0, 1, 2, 3, 100))
    ]
    assert run(RULES["trimmed"](trim=0.2), answers, start, 1.0).tensors["w"] == 2
    assert run(RULES["median"](), answers, start, 1.0).tensors["w"] == 2
    assert run(RULES["mean"](), answers, start, 1.0).tensors["w"] == np.float32(21.2)


def test_distances_are_those_of_dense_products() -> None:
    found = squares(hold(ANSWERS, BEFORE), BEFORE.tensors)
    dense = [np.concatenate([v.ravel() for v in products(a.tensors, SCALE).values()]) for a in ANSWERS]
    rest = [
        np.concatenate(
            [
                np.float64(v).ravel()
                for n, v in sorted(a.tensors.items())
                if "lora_A" not in n and "lora_B" not in n
            ]
        )
        for a in ANSWERS
    ]
    for i in range(7):
        for j in range(7):
            wanted = np.sum((dense[i] - dense[j]) ** 2) + np.sum((rest[i] - rest[j]) ** 2)
            assert found[i, j] == pytest.approx(wanted, rel=1e-9, abs=1e-9)


def test_krum_takes_the_answer_with_the_nearest_neighbours() -> None:
    """0, 1, 2, 3, 100 with one faulty: the sums of the two least squared distances are 5, 2, 2, 5 and huge;
    the first 2 wins.

    All but the faulty one are averaged where nothing else is said: (0 + 1 + 2 + 3) / 4.
    """
    start = Combined({"w": np.zeros(1, np.float32)})
    answers = [
        ClientAdapter(i, {"w": np.full(1, value, np.float32)}) for i, value in enumerate((0, 1, 2, 3, 100))
    ]
    assert run(RULES["krum"](faulty=1, chosen=1), answers, start, 1.0).tensors["w"] == 1
    assert run(RULES["krum"](faulty=1, chosen=2), answers, start, 1.0).tensors["w"] == 1.5
    assert run(RULES["krum"](faulty=1), answers, start, 1.0).tensors["w"] == 1.5


@pytest.mark.parametrize("first", [0, 6])
@pytest.mark.parametrize("name", ["head.bias", "layers.0.q.lora_B.weight"])
def test_a_huge_answer_does_not_hide_another(first: int, name: str) -> None:
    """Two liars: one so far away that differences of the others would drown beside it, whatever its number;
    krum leaves out both."""
    answers = [ClientAdapter(i, near(BEFORE.tensors, i, 0.03), 1.0, SCALE) for i in range(8)]
    answers[first] = replace(
        answers[first],
        tensors=dict(answers[first].tensors) | {name: np.full_like(BEFORE.tensors[name], 1e20)},
    )
    answers[3] = replace(answers[3], tensors={n: -10 * v for n, v in answers[3].tensors.items()})
    honest = [a for i, a in enumerate(answers) if i not in (first, 3)]
    made = run(RULES["krum"](faulty=2), answers, BEFORE, SCALE)
    np.testing.assert_allclose(
        made.tensors["head.bias"], np.mean([a.tensors["head.bias"] for a in honest], axis=0), rtol=1e-5
    )
    assert (
        apart(
            products(made, SCALE), {module: cut(product) for module, product in mean_product(honest).items()}
        )
        < 1e-6
    )


def test_krum_averages_products() -> None:
    made = run(RULES["krum"](faulty=1, chosen=7), ANSWERS, BEFORE, SCALE)
    wanted = {
        module: cut(product)
        for module, product in mean_product([replace(a, weight=1.0) for a in ANSWERS]).items()
    }
    assert apart(products(made, SCALE), wanted) < 1e-6


def test_clipping_by_hand() -> None:
    """Moves 1, 2, 3 with bound 2 are 1, 2, 2; the median of their norms is 2 as well."""
    start = Combined({"w": np.full(1, 10, np.float32)})
    answers = [ClientAdapter(i, {"w": np.full(1, 10 + move, np.float32)}) for i, move in enumerate((1, 2, 3))]
    for bound in (2.0, 0.0):
        made = run(RULES["clipped"](bound=bound), answers, start, 1.0)
        assert made.tensors["w"] == np.float32(10 + 5 / 3)
        assert made.report["clipped"] == pytest.approx(1 / 3) and made.report["bound"] == pytest.approx(2)


def test_clipping_shortens_moves_of_products() -> None:
    origin = products(BEFORE, SCALE)
    made = run(RULES["clipped"](bound=3.0), ANSWERS, BEFORE, SCALE)
    wanted = {module: value.copy() for module, value in origin.items()}
    for a in ANSWERS:
        own = products(a.tensors, SCALE)
        rest = [
            np.sum((np.float64(v) - BEFORE.tensors[n]) ** 2)
            for n, v in a.tensors.items()
            if not n.endswith((".lora_A.weight", ".lora_B.weight"))
        ]
        norm = np.sqrt(sum(np.sum((own[m] - origin[m]) ** 2) for m in SHAPES) + sum(rest))
        for module in SHAPES:
            wanted[module] += min(1, 3 / norm) / len(ANSWERS) * (own[module] - origin[module])
    assert apart(products(made, SCALE), {module: cut(value) for module, value in wanted.items()}) < 1e-6


@pytest.mark.parametrize(
    ("rule", "gain"), [("mean", None), ("median", 0.9), ("trimmed", 0.9), ("krum", 0.9), ("clipped", 0.8)]
)
def test_two_of_ten_send_ten_times_the_opposite(rule: str, gain: float | None) -> None:
    """gain = 1 - ||result - truth||^2 / ||truth||^2: what is left of the way from a zero product.

    The mean goes the wrong way, (8 - 20) / 10. Clipping keeps their direction with length one: (8 - 2) / 10 =
    0.6 of the way, gain 0.84.
    """
    truth = adapter(4, 1)
    start = Combined(
        {name: np.zeros_like(value) if "lora_B" in name else value for name, value in truth.items()}
    )
    answers = [ClientAdapter(i, near(truth, i, 0.03), 1.0, SCALE) for i in range(10)]
    for i in (2, 5):
        flipped = {n: np.float32(-10 * v) if "lora_B" in n else v for n, v in answers[i].tensors.items()}
        answers[i] = ClientAdapter(i, flipped, 1.0, SCALE)
    options = {"krum": {"faulty": 2}}.get(rule, {})
    found = (
        1
        - apart(products(run(RULES[rule](**options), answers, start, SCALE), SCALE), products(truth, SCALE))
        ** 2
    )
    assert found < 0 if gain is None else found > gain


@pytest.mark.parametrize("rule", ["median", "trimmed", "krum", "clipped"])
def test_a_client_that_claims_a_million_examples_counts_once(rule: str) -> None:
    answers = [ClientAdapter(a.client, a.tensors, 1e6 if a.client == 0 else 1.0, SCALE) for a in ANSWERS]
    assert (
        apart(
            products(run(RULES[rule](), answers, BEFORE, SCALE), SCALE),
            products(run(RULES[rule](), ANSWERS, BEFORE, SCALE), SCALE),
        )
        < 1e-9
    )

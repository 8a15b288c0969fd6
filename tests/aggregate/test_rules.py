"""Each rule against its own naive twin, on products formed as matrices."""

from __future__ import annotations

import numpy as np
import pytest

from fedtune.aggregate import RULES, ClientAdapter, Combined, Pair, split
from fedtune.aggregate.fedrot import turned
from fedtune.aggregate.fedsb import Core, as_pair, start
from fedtune.schema import digest
from fedtune.types import Round
from tests.aggregate.dense import NOW, SHAPES, adapter, apart, mean_product, near, products, run

SCALE = 2.0
BEFORE = Combined(adapter(4, 0))
ANSWERS = [ClientAdapter(i, near(BEFORE.tensors, i), 1.0 + i, SCALE) for i in range(5)]
MIXED = [ClientAdapter(i, adapter(rank, i), 1.0 + i, 8 / rank) for i, rank in enumerate((4, 2, 1, 3))]


def factor(answers: list[ClientAdapter], name: str) -> np.ndarray:
    """The plain mean, in float64."""
    total = sum(a.weight for a in answers)
    return np.asarray(sum(a.weight / total * np.float64(a.tensors[name]) for a in answers))


def test_mean_averages_factors() -> None:
    made = run(RULES["mean"](), ANSWERS, BEFORE, SCALE).tensors
    for name, value in made.items():
        np.testing.assert_allclose(value, factor(ANSWERS, name), rtol=1e-6)


@pytest.mark.parametrize(
    ("rule", "odd", "even"),
    [
        ("ffa", {"B"}, {"B"}),
        ("rolora", {"B"}, {"A"}),
        ("fedsa", {"A"}, {"A"}),
        ("mean", {"A", "B"}, {"A", "B"}),
    ],
)
def test_which_factor_travels(rule: str, odd: set[str], even: set[str]) -> None:
    names = [*BEFORE.tensors]
    for number, letters in ((1, odd), (2, even), (3, odd)):
        sent = RULES[rule]().sends(names, number)
        assert {name.split("lora_")[1][0] for name in sent if ".weight" in name} == letters
        assert {"head.bias", "temperature"} <= sent


@pytest.mark.parametrize("rule", ["ffa", "rolora"])
def test_with_one_common_factor_the_mean_is_exact(rule: str) -> None:
    common = [
        ClientAdapter(
            a.client,
            {n: BEFORE.tensors[n] if "lora_A" in n else v for n, v in a.tensors.items()},
            a.weight,
            SCALE,
        )
        for a in ANSWERS
    ]
    made = run(RULES[rule](), common, BEFORE, SCALE)
    assert apart(products(made, SCALE), mean_product(common)) < 1e-6


def test_fedsa_leaves_b_alone() -> None:
    rule = RULES["fedsa"]()
    made = run(rule, ANSWERS, BEFORE, SCALE).tensors
    assert rule.stays(made) == {f"{module}.lora_B.weight" for module in SHAPES}
    for name in rule.stays(made):
        assert (made[name] == BEFORE.tensors[name]).all()


@pytest.mark.parametrize("answers", [ANSWERS, MIXED], ids=["one rank", "mixed ranks"])
def test_flexlora_is_the_best_of_its_rank(answers: list[ClientAdapter]) -> None:
    made = run(RULES["flexlora"](), answers, BEFORE, SCALE)
    wanted = {}
    for module, product in mean_product(answers).items():
        u, s, vt = np.linalg.svd(product, full_matrices=False)
        wanted[module] = (u[:, :4] * s[:4]) @ vt[:4]
        assert made.layers[module] == pytest.approx(np.linalg.norm(s[4:]) / np.linalg.norm(s), rel=1e-5)
    assert apart(products(made, SCALE), wanted) < 1e-6


def test_flexlora_takes_clients_of_more_rank_than_its_own() -> None:
    small = Combined(adapter(2, 0))
    made = run(RULES["flexlora"](), MIXED, small, SCALE)
    assert made.report["error"] == pytest.approx(apart(products(made, SCALE), mean_product(MIXED)), rel=1e-5)


@pytest.mark.parametrize("rule", ["flora", "fedex"])
@pytest.mark.parametrize("answers", [ANSWERS, MIXED], ids=["one rank", "mixed ranks"])
def test_rules_with_a_residual_are_exact(rule: str, answers: list[ClientAdapter]) -> None:
    made = run(RULES[rule](), answers, BEFORE, SCALE)
    assert apart(products(made, SCALE), mean_product(answers)) < 1e-6
    assert made.report["error"] == 0.0
    assert (
        made.report["residual_rank"] == max(pair.rank for pair in made.residual.values()) <= 9
    )  # min(d, k) is 9 and 8


@pytest.mark.parametrize("rule", ["flora", "fedex"])
def test_a_residual_that_was_there_stays(rule: str) -> None:
    old = {"layers.0.q": Pair(np.ones((12, 1), np.float32), np.arange(9, dtype=np.float32)[None])}
    made = run(RULES[rule](), ANSWERS, Combined(BEFORE.tensors, old), SCALE)
    wanted = mean_product(ANSWERS)
    wanted["layers.0.q"] = wanted["layers.0.q"] + np.arange(9)
    assert apart(products(made, SCALE), wanted) < 1e-6


@pytest.mark.parametrize("rule", ["flora", "fedex"])
def test_a_residual_can_be_cut_and_says_what_that_costs(rule: str) -> None:
    made = run(RULES[rule](extra=2), ANSWERS, BEFORE, SCALE)
    assert {pair.rank for pair in made.residual.values()} == {2}
    assert made.report["error"] == pytest.approx(
        apart(products(made, SCALE), mean_product(ANSWERS)), rel=1e-5
    )
    assert 0 < made.report["error"] < 1


def test_flora_starts_afresh_every_round() -> None:
    first, again = (run(RULES["flora"](), ANSWERS, BEFORE, SCALE, NOW).tensors for _ in range(2))
    later = run(RULES["flora"](), ANSWERS, BEFORE, SCALE, Round(2, 7, (0, 1))).tensors
    assert digest(first) == digest(again)
    for module in SHAPES:
        assert not first[f"{module}.lora_B.weight"].any()
        assert not np.allclose(first[f"{module}.lora_A.weight"], later[f"{module}.lora_A.weight"])


def test_fedex_keeps_the_mean_factors() -> None:
    made = run(RULES["fedex"](), ANSWERS, BEFORE, SCALE).tensors
    for module in SHAPES:
        for name in (f"{module}.lora_A.weight", f"{module}.lora_B.weight"):
            np.testing.assert_allclose(made[name], factor(ANSWERS, name), atol=1e-6)


@pytest.mark.parametrize("lam", [1e-4, 0.01, 1.0])
def test_fair_solves_its_least_squares(lam: float) -> None:
    """min ||dW - s (Bm + dB) Am||^2 + lam t ||dB||^2 as one ordinary least squares with lam as extra rows."""
    made = run(RULES["fair"](lam=lam), ANSWERS, BEFORE, SCALE).tensors
    for module, product in mean_product(ANSWERS).items():
        a, b = factor(ANSWERS, f"{module}.lora_A.weight"), factor(ANSWERS, f"{module}.lora_B.weight")
        m = SCALE * a
        t = float(np.mean(np.linalg.eigvalsh(m @ m.T)))
        rows = np.concatenate([m.T, np.sqrt(lam * t) * np.eye(4)])
        goal = np.concatenate([(product - b @ m).T, np.zeros((4, len(b)))])
        change = np.linalg.lstsq(rows, goal, rcond=None)[0].T
        np.testing.assert_allclose(made[f"{module}.lora_B.weight"], b + change, atol=1e-5)
        np.testing.assert_allclose(made[f"{module}.lora_A.weight"], a, atol=1e-6)


def test_fair_is_nearer_than_the_mean_and_no_nearer_than_the_best() -> None:
    fair, best = (
        run(RULES["fair"](), ANSWERS, BEFORE, SCALE),
        run(RULES["flexlora"](), ANSWERS, BEFORE, SCALE),
    )
    assert best.report["error"] <= fair.report["error"] < 0.9 * fair.report["drift"]


@pytest.mark.parametrize("by", ["slices", "padding"])
def test_hetlora_slice_by_slice(by: str) -> None:
    """A loop over slices: who has it, with what weight."""
    made = run(RULES["hetlora"](by=by), MIXED, BEFORE, SCALE).tensors
    for module in SHAPES:
        for j in range(4):
            having = [a for a in MIXED if a.tensors[f"{module}.lora_A.weight"].shape[0] > j]
            total = sum(a.weight for a in (having if by == "slices" else MIXED))
            row = sum(a.weight * np.float64(a.tensors[f"{module}.lora_A.weight"][j]) for a in having) / total
            column = (
                sum(
                    a.weight * a.scale / SCALE * np.float64(a.tensors[f"{module}.lora_B.weight"][:, j])
                    for a in having
                )
                / total
            )
            np.testing.assert_allclose(made[f"{module}.lora_A.weight"][j], row, atol=1e-6)
            np.testing.assert_allclose(made[f"{module}.lora_B.weight"][:, j], column, atol=1e-6)


def test_padding_thins_out_what_few_clients_have() -> None:
    """One of four clients has slices 2 and 3, and all agree: with padding a quarter of A times a quarter of B
    is left of them."""
    whole = adapter(4, 0)
    small = RULES["hetlora"]().for_rank(whole, SCALE, 2, SCALE)
    answers = [ClientAdapter(0, whole, 1.0, SCALE), *(ClientAdapter(i, small, 1.0, SCALE) for i in (1, 2, 3))]
    by_slice, padded = (run(RULES["hetlora"](by=by), answers, BEFORE, SCALE) for by in ("slices", "padding"))
    assert apart(products(by_slice, SCALE), products(whole, SCALE)) < 1e-6
    for module, pair in split(padded.tensors)[0].items():
        before = split(whole)[0][module]
        np.testing.assert_allclose(pair.B[:, 2:] @ pair.A[2:], before.B[:, 2:] @ before.A[2:] / 16, atol=1e-6)


def test_a_slice_that_nobody_has_stays() -> None:
    made = run(RULES["hetlora"](), MIXED[1:3], BEFORE, SCALE).tensors
    assert (made["layers.0.q.lora_A.weight"][2:] == BEFORE.tensors["layers.0.q.lora_A.weight"][2:]).all()


def test_hetlora_gives_the_first_slices() -> None:
    given = RULES["hetlora"]().for_rank(BEFORE.tensors, SCALE, 2, 4.0)
    np.testing.assert_allclose(
        given["layers.0.q.lora_A.weight"], BEFORE.tensors["layers.0.q.lora_A.weight"][:2]
    )
    np.testing.assert_allclose(
        given["layers.0.q.lora_B.weight"], BEFORE.tensors["layers.0.q.lora_B.weight"][:, :2] / 2
    )


def test_fedrot_undoes_a_turn_that_the_mean_falls_for() -> None:
    """Every client holds the same product in another basis: the mean of factors loses it, the turned mean
    finds it."""
    rng = np.random.default_rng(3)
    answers = []
    for i in range(6):
        q = np.linalg.qr(rng.normal(size=(4, 4)))[0]
        turned = dict(BEFORE.tensors)
        for module in SHAPES:
            turned[f"{module}.lora_A.weight"] = (q.T @ BEFORE.tensors[f"{module}.lora_A.weight"]).astype(
                np.float32
            )
            turned[f"{module}.lora_B.weight"] = (BEFORE.tensors[f"{module}.lora_B.weight"] @ q).astype(
                np.float32
            )
        answers.append(ClientAdapter(i, turned, 1.0, SCALE))
    made = run(RULES["fedrot"](), answers, BEFORE, SCALE)
    assert apart(products(made, SCALE), products(BEFORE, SCALE)) < 1e-6
    assert made.report["drift"] > 0.5


@pytest.mark.parametrize("blank", ["A", "B"])
def test_either_factor_tells_the_turn(blank: str) -> None:
    """Where one factor of the reference is zero, as B is at the start, the other alone finds the way back."""
    whole = split(BEFORE.tensors)[0]["layers.0.q"]
    q = np.linalg.qr(np.random.default_rng(5).normal(size=(4, 4)))[0]
    back = turned(
        Pair(whole.B @ q, q.T @ whole.A), whole._replace(**{blank: np.zeros_like(getattr(whole, blank))})
    )
    np.testing.assert_allclose(back.B, whole.B, atol=1e-6)
    np.testing.assert_allclose(back.A, whole.A, atol=1e-6)


def nearest(core: Core, pair: Pair) -> np.ndarray:
    """The R for which B R A is nearest to a pair's product (scales equal): B^T (B' A') A^T, from factors
    only."""
    near: np.ndarray = (core.B.T @ np.asarray(pair.B, dtype=np.float64)) @ (
        np.asarray(pair.A, dtype=np.float64) @ core.A.T
    )
    return near.astype(np.float32)


def test_fedsb_averages_what_stands_between_fixed_factors() -> None:
    """Mean of R = mean of products, and (B R, A) is the stock pair of it."""
    rng = np.random.default_rng(2)
    core = start(rng.normal(size=(12, 9)), 3, SCALE)
    np.testing.assert_allclose(core.B.T @ core.B, np.eye(3), atol=1e-6)
    np.testing.assert_allclose(core.A @ core.A.T, np.eye(3), atol=1e-6)
    rs = [core.R + rng.normal(size=(3, 3)).astype(np.float32) for _ in range(4)]
    before = Combined({"m.lora_A.weight": core.A, "m.lora_B.weight": core.B, "m.lora_R.weight": core.R})
    made = run(
        RULES["fedsb"](),
        [
            ClientAdapter(i, dict(before.tensors) | {"m.lora_R.weight": r}, 1.0, SCALE)
            for i, r in enumerate(rs)
        ],
        before,
        SCALE,
    ).tensors
    mean = core._replace(R=made["m.lora_R.weight"])
    wanted = np.mean([np.float64(core.B) @ r @ core.A for r in rs], axis=0)
    np.testing.assert_allclose(as_pair(mean).B @ core.A, wanted, atol=1e-5)
    np.testing.assert_allclose(nearest(core, as_pair(mean)), mean.R, atol=1e-5)


@pytest.mark.parametrize("rank", [2, 5])
def test_fedsb_starts_from_the_best_approximation(rank: int) -> None:
    """Of a rank 3 update: rank 2 is its truncation, rank 5 all of it, with orthonormal room for more."""
    rng = np.random.default_rng(4)
    update = Pair(rng.normal(size=(12, 3)), rng.normal(size=(3, 9)))
    core = start(update, rank, SCALE)
    u, s, vt = np.linalg.svd(update.B @ update.A)
    kept = min(rank, 3)
    np.testing.assert_allclose(
        SCALE * core.B @ core.R @ core.A, (u[:, :kept] * s[:kept]) @ vt[:kept], atol=1e-5
    )
    np.testing.assert_allclose(core.B.T @ core.B, np.eye(rank), atol=1e-6)
    np.testing.assert_allclose(core.A @ core.A.T, np.eye(rank), atol=1e-6)

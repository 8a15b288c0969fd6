"""Merging finished experts: each merge against its naive twin on dense products, and six trained experts in
one."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache

import numpy as np
import pytest

from fedtune.aggregate import MERGES, ClientAdapter, Combined, Merge
from fedtune.aggregate.elementwise import BLOCK
from fedtune.errors import FedtuneError
from fedtune.schema import digest
from tests.aggregate.dense import SHAPES, adapter, apart, mean_product, products

SCALE, FULL = 0.5, 9  # the result's; a rank that holds any product of these shapes
EXPERTS = [ClientAdapter(i, adapter(rank, i), 1.0 + i, 8 / rank) for i, rank in enumerate((4, 2, 3))]
WEIGHTS = np.array([1, 2, 3])[:, None, None] / 6
BUILT: dict[str, Merge] = {
    "mean": MERGES["mean"](),
    "task": MERGES["task"](lam=1 / 3),
    "ties": MERGES["ties"](density=1.0),
    "dare": MERGES["dare"](p=0.0),
    "breadcrumbs": MERGES["breadcrumbs"](keep=1.0, outliers=0.0, lam=1 / 3),
    "lines": MERGES["lines"](alpha=1.0, beta=0.0),
    "pcb": MERGES["pcb"](keep=1.0),
    "soup": MERGES["soup"](lambda made: 0.0),
}


def each(module: str) -> np.ndarray:
    """(experts, d, k)"""
    return np.stack([products(expert.tensors, expert.scale)[module] for expert in EXPERTS])


def greatest(tau: np.ndarray, share: float) -> np.ndarray:
    """Which entries are among the greatest share of their expert."""
    order = np.sort(np.abs(tau).reshape(len(tau), -1), axis=1)[:, ::-1]
    return np.abs(tau) >= order[:, round(share * order.shape[1]) - 1][:, None, None]


def trimmed_and_elected(tau: np.ndarray, weights: np.ndarray, density: float) -> np.ndarray:
    tau = tau * greatest(tau, density)
    agree = weights * (np.sign(tau) == np.where((weights * tau).sum(0) >= 0, 1, -1))
    return np.asarray((agree * tau).sum(0) / np.where(agree.sum(0) > 0, agree.sum(0), 1))


def scored(tau: np.ndarray, keep: float) -> np.ndarray:
    """PCB-Merging, whole arrays at once."""
    flat = np.abs(tau).reshape(len(tau), -1)
    a = np.clip(flat, *np.quantile(flat, [0.01, 0.99], axis=1)[:, :, None])
    a = (a - a.min(1, keepdims=True)) / (a.max(1, keepdims=True) - a.min(1, keepdims=True))
    s = np.sign(tau).reshape(flat.shape) * a
    raw = np.exp(len(tau) * a**2) * sum(np.tanh(s * other) for other in s)
    raw = np.maximum(raw, np.quantile(raw, 1 - keep, axis=1, keepdims=True))
    beta = (raw - raw.min(1, keepdims=True)) / (raw.max(1, keepdims=True) - raw.min(1, keepdims=True))
    total = beta.sum(0)
    return np.asarray(
        np.where(
            total > 0, (beta * tau.reshape(flat.shape)).sum(0) / np.where(total > 0, total, 1), 0
        ).reshape(tau.shape[1:])
    )


def merged(merge: Merge, rank: int = FULL) -> dict[str, np.ndarray]:
    return products(merge(EXPERTS, rank, SCALE), SCALE)


def wanted(of: object) -> dict[str, np.ndarray]:
    return {module: of(each(module)) for module in SHAPES}  # type: ignore[operator]


def test_every_merge_is_here() -> None:
    assert BUILT.keys() == MERGES.keys()


@pytest.mark.parametrize("name", sorted(BUILT))
def test_equal_experts_give_that_expert(name: str) -> None:
    """With nothing trimmed or dropped. PCB's scores leave out the entries that score least, whatever is
    kept."""
    made = BUILT[name]([ClientAdapter(i, EXPERTS[0].tensors, 1.0 + i, 2.0) for i in range(3)], FULL, SCALE)
    assert apart(products(made, SCALE), products(EXPERTS[0].tensors, 2.0)) < (0.1 if name == "pcb" else 1e-6)
    assert (made.tensors["head.bias"] == EXPERTS[0].tensors["head.bias"]).all()


@pytest.mark.parametrize("name", sorted(set(BUILT) - {"soup"}))
def test_the_order_of_experts_does_not_matter(name: str) -> None:
    there, back = (products(BUILT[name](experts, FULL, SCALE), SCALE) for experts in (EXPERTS, EXPERTS[::-1]))
    assert apart(there, back) < 1e-6


@pytest.mark.parametrize("name", ["mean", "task", "lines", "soup"])
def test_concatenation_is_exact(name: str) -> None:
    made = BUILT[name](EXPERTS, 0, SCALE)
    assert made.report["error"] == 0.0
    if name != "soup":
        assert apart(products(made, SCALE), mean_product(EXPERTS)) < 1e-6


def test_a_cut_says_what_it_costs() -> None:
    made = MERGES["mean"]()(EXPERTS, 3, SCALE)
    assert made.report["error"] == pytest.approx(
        apart(products(made, SCALE), mean_product(EXPERTS)), rel=1e-5
    )
    made = MERGES["ties"]()(EXPERTS, 3, SCALE)
    assert made.report["error"] == pytest.approx(
        apart(products(made, SCALE), wanted(lambda tau: trimmed_and_elected(tau, WEIGHTS, 0.2))), rel=1e-5
    )


def test_task_arithmetic_is_the_sum_times_lam() -> None:
    assert apart(merged(MERGES["task"](lam=0.4)), wanted(lambda tau: 0.4 * 3 * (WEIGHTS * tau).sum(0))) < 1e-6


@pytest.mark.parametrize("block", [BLOCK, 100], ids=["one block", "row by row"])
def test_ties(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedtune.aggregate.elementwise.BLOCK", block)
    assert (
        apart(
            merged(MERGES["ties"](density=0.3, lam=0.5)),
            wanted(lambda tau: 0.5 * trimmed_and_elected(tau, WEIGHTS, 0.3)),
        )
        < 1e-6
    )


def test_ties_by_hand() -> None:
    """Entries 4, 1 | 3, 1 | -6, 1 with half kept: 4, 3, -6; the sum is 1, so plus is elected and (4 + 3) / 2
    = 3.5; the small entry is gone."""
    experts = [
        ClientAdapter(
            i, {"m.lora_A.weight": np.float32([[big, 1]]), "m.lora_B.weight": np.ones((1, 1), np.float32)}
        )
        for i, big in enumerate((4, 3, -6))
    ]
    np.testing.assert_allclose(
        products(MERGES["ties"](density=0.5)(experts, 1, 1.0), 1.0)["m"], [[3.5, 0]], atol=1e-6
    )


def test_breadcrumbs() -> None:
    def naive(tau: np.ndarray) -> np.ndarray:
        inside = greatest(tau, 0.8) & ~greatest(tau, 0.1)
        return np.asarray(0.3 * 3 * (WEIGHTS * tau * inside).sum(0))

    assert apart(merged(MERGES["breadcrumbs"](keep=0.8, outliers=0.1, lam=0.3)), wanted(naive)) < 1e-6


@pytest.mark.parametrize("keep", [0.2, 0.5])
@pytest.mark.parametrize("block", [BLOCK, 100], ids=["one block", "row by row"])
def test_pcb(keep: float, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedtune.aggregate.elementwise.BLOCK", block)
    assert apart(merged(MERGES["pcb"](keep=keep)), wanted(lambda tau: scored(tau, keep))) < 1e-6


def test_dare_drops_and_rescales() -> None:
    """One expert, p = 0.75: an entry is gone or four times itself; the same seed draws the same, whatever the
    blocks."""
    made = products(MERGES["dare"](p=0.75, seed=3)(EXPERTS[:1], FULL, SCALE), SCALE)
    for module, product in products(EXPERTS[0].tensors, EXPERTS[0].scale).items():
        share = made[module] / product
        kept = np.abs(share - 4) < 1e-3
        assert (kept | (np.abs(share) < 1e-3)).all()
        assert 0.1 < kept.mean() < 0.4
    again = products(MERGES["dare"](p=0.75, seed=3)(EXPERTS[:1], FULL, SCALE), SCALE)
    other = products(MERGES["dare"](p=0.75, seed=4)(EXPERTS[:1], FULL, SCALE), SCALE)
    assert apart(again, made) == 0 and apart(other, made) > 0.1


def test_dare_does_not_depend_on_the_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = MERGES["dare"]()(EXPERTS, FULL, SCALE).tensors
    monkeypatch.setattr("fedtune.aggregate.elementwise.BLOCK", 100)
    assert apart(products(MERGES["dare"]()(EXPERTS, FULL, SCALE), SCALE), products(whole, SCALE)) < 1e-6


def test_lines_scales_by_depth() -> None:
    """Two blocks: the first by alpha, the last by alpha + beta; it follows any merge."""
    made, plain = merged(MERGES["lines"](alpha=0.5, beta=2.0, of=MERGES["ties"]())), merged(MERGES["ties"]())
    assert (
        apart(made, {"layers.0.q": 0.5 * plain["layers.0.q"], "layers.1.up": 2.5 * plain["layers.1.up"]})
        < 1e-6
    )


def test_a_greedy_soup_by_hand() -> None:
    """Values 1, 4, 2 and the goal 3: 4 is first or 2 is (both are 1 away, the earlier wins); adding 2 gives
    3, adding 1 would leave it."""
    experts = [ClientAdapter(i, {"w": np.full(1, value, np.float32)}) for i, value in enumerate((1, 4, 2))]
    made = MERGES["soup"](lambda made: -abs(float(made.tensors["w"][0]) - 3))(experts, 0, 1.0)
    assert made.tensors["w"] == 3 and made.report["kept"] == 2 and made.report["score"] == 0


def test_a_soup_takes_what_does_no_harm() -> None:
    """An expert is left out only where the score drops: with one score for all, everybody is in."""
    assert MERGES["soup"](lambda made: 0.0)(EXPERTS, 0, SCALE).report["kept"] == 3


@pytest.mark.parametrize("name", ["ties", "dare", "breadcrumbs", "pcb"])
def test_merges_of_entries_need_a_rank(name: str) -> None:
    with pytest.raises(FedtuneError, match="C102: found rank 0"):
        BUILT[name](EXPERTS, 0, SCALE)


@pytest.mark.parametrize("name", sorted(BUILT))
def test_bad_experts_are_refused(name: str) -> None:
    with pytest.raises(FedtuneError, match="R405"):
        BUILT[name]([], FULL, SCALE)
    bad = ClientAdapter(1, {key: np.full_like(value, np.nan) for key, value in EXPERTS[0].tensors.items()})
    with pytest.raises(FedtuneError, match="W607: found NaN or Inf"):
        BUILT[name]([EXPERTS[0], bad], FULL, SCALE)


# --- six experts that were trained ---


@cache
def trained() -> tuple[list[ClientAdapter], list[tuple[np.ndarray, np.ndarray]], dict[str, np.ndarray]]:
    """Six linear regressions with something in common, each learnt by an adapter of rank 4 from one common
    start (Adam, 60 steps)."""
    rng = np.random.default_rng(0)
    common, a0 = rng.normal(size=(24, 20)) / 2, rng.normal(size=(4, 20)) / np.sqrt(20)
    experts, domains = [], []
    for t in range(6):
        x = (
            rng.normal(size=(200, 20)) * rng.uniform(0.2, 2, 20) * np.where(rng.random(20) < 0.4, 2, 0.3)
        )  # each domain has its own directions
        y = x @ (common + rng.normal(size=(24, 4)) @ rng.normal(size=(4, 20)) / 2).T
        values, first, second = [np.zeros((24, 4)), a0], [0.0, 0.0], [0.0, 0.0]
        for step in range(1, 61):
            b, a = values
            slope = 2 * (2 * x @ (b @ a).T - y).T @ x / len(x)  # the scale is 2
            for i, gradient in enumerate((slope @ a.T, b.T @ slope)):
                first[i] = 0.9 * first[i] + 0.1 * gradient
                second[i] = 0.999 * second[i] + 0.001 * gradient**2
                values[i] = values[i] - 0.05 * (first[i] / (1 - 0.9**step)) / (
                    np.sqrt(second[i] / (1 - 0.999**step)) + 1e-8
                )
        experts.append(
            ClientAdapter(
                t,
                {"m.lora_B.weight": np.float32(values[0]), "m.lora_A.weight": np.float32(values[1])},
                1.0,
                2.0,
            )
        )
        domains.append((x, y))
    return experts, domains, {"m.lora_B.weight": np.zeros((24, 4)), "m.lora_A.weight": a0}


def loss(weight: np.ndarray) -> float:
    """The mean over domains of the part that is not explained; 1 without an adapter."""
    return float(np.mean([np.mean((x @ weight.T - y) ** 2) / np.mean(y**2) for x, y in trained()[1]]))


def test_merging_products_is_better_than_merging_factors() -> None:
    """The order of a real run with six language experts: mean of products < mean of factors < base < TIES of
    factors."""
    experts, _, start = trained()
    mean = loss(products(MERGES["mean"]()(experts, 0, 1.0), 1.0)["m"])
    ties = loss(products(MERGES["ties"](density=0.5, lam=0.5)(experts, 20, 1.0), 1.0)["m"])
    factor = {name: np.stack([expert.tensors[name] for expert in experts]) for name in start}
    of_factors = loss(2 * factor["m.lora_B.weight"].mean(0) @ factor["m.lora_A.weight"].mean(0))
    each_way = np.ones((6, 1, 1))
    ties_of_factors = {
        name: start[name] + 0.5 * trimmed_and_elected(value - start[name], each_way, 0.5)
        for name, value in factor.items()
    }
    ties_of_factors_loss = loss(2 * ties_of_factors["m.lora_B.weight"] @ ties_of_factors["m.lora_A.weight"])
    assert mean < of_factors < loss(np.zeros((24, 20))) == 1.0
    assert ties < ties_of_factors_loss
    assert mean < 0.9 and ties_of_factors_loss > 1


def test_the_same_experts_give_the_same_bytes() -> None:
    for merge in BUILT.values():
        assert digest(merge(EXPERTS, 3, SCALE).tensors) == digest(merge(EXPERTS, 3, SCALE).tensors)
    assert isinstance(BUILT["mean"](EXPERTS, 3, SCALE), Combined)


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: MERGES["dare"](p=1.0), "p = 1 for a merge, expected 0 or more, below 1"),
        (lambda: MERGES["dare"](p=-0.1), "p = -0.1"),
        (lambda: MERGES["dare"](p=float("nan")), "p = nan"),
        (lambda: MERGES["dare"](seed=-1), "seed = -1"),
        (lambda: MERGES["ties"](density=0.0), "density = 0 for a merge, expected above 0, at most 1"),
        (lambda: MERGES["ties"](density=1.5), "density = 1.5"),
        (lambda: MERGES["ties"](lam=float("inf")), "lam = inf for a merge, expected a finite number"),
        (lambda: MERGES["task"](lam=float("nan")), "lam = nan"),
        (
            lambda: MERGES["breadcrumbs"](keep=0.2, outliers=0.2),
            "keep = 0.2 for a merge, expected above outliers = 0.2",
        ),
        (lambda: MERGES["breadcrumbs"](outliers=-0.01), "outliers = -0.01"),
        (lambda: MERGES["breadcrumbs"](keep=1.01), "keep = 1.01"),
        (lambda: MERGES["breadcrumbs"](lam=float("inf")), "lam = inf"),
        (lambda: MERGES["pcb"](keep=0.0), "keep = 0"),
        (lambda: MERGES["pcb"](lam=float("nan")), "lam = nan"),
        (lambda: MERGES["lines"](alpha=float("inf"), beta=0.0), "alpha = inf"),
        (lambda: MERGES["lines"](alpha=1.0, beta=float("nan")), "beta = nan"),
    ],
)
def test_options_out_of_range_are_refused_before_any_expert_is_read(
    build: Callable[[], Merge], said: str
) -> None:
    with pytest.raises(FedtuneError, match=f"C102: found {re.escape(said)}"):
        build()


def test_a_soup_with_a_score_that_is_no_number_is_refused() -> None:
    """NaN has no order: as a first score it would stay the best for ever, later ones would never be taken."""
    bad = {1: float("nan")}
    scores = iter(range(9))
    with pytest.raises(
        FedtuneError, match="W607: found a score of NaN for a soup of experts 1, expected a number"
    ):
        MERGES["soup"](lambda made: bad.get(next(scores), 1.0))(EXPERTS, FULL, SCALE)
    lost = MERGES["soup"](lambda made: float("-inf"))(EXPERTS, FULL, SCALE)  # all equally bad is an order
    assert lost.report["kept"] == 3


@pytest.mark.parametrize("name", ["mean", "task"])
def test_a_rank_below_zero_is_refused(name: str) -> None:
    with pytest.raises(FedtuneError, match="C102: found rank -1"):
        MERGES[name]()(EXPERTS, -1, SCALE)


@pytest.mark.parametrize(
    "merge",
    [
        MERGES["mean"](),
        MERGES["ties"](),
        MERGES["lines"](alpha=0.5, beta=2.0),
        MERGES["soup"](lambda made: 0.0),
    ],
)
def test_a_cut_says_what_it_costs_in_every_module(merge: Merge) -> None:
    """Against the same merge at full rank; the whole is the sum of squares, whatever a merge does to single
    blocks."""
    whole, cut = products(merge(EXPERTS, FULL, SCALE), SCALE), merge(EXPERTS, 3, SCALE)
    made = products(cut, SCALE)
    for module, error in cut.layers.items():
        assert (
            error == pytest.approx(apart({module: made[module]}, {module: whole[module]}), rel=1e-5)
            and error > 0.01
        )
    assert cut.layers.keys() == SHAPES.keys()
    assert cut.report["error"] == pytest.approx(apart(made, whole), rel=1e-5)

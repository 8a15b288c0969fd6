"""Sums of products through the small core, against products formed as matrices."""

from __future__ import annotations

import numpy as np
import pytest

from fedtune.aggregate import ClientAdapter, Combined, Pair, as_adapter, for_rank, split
from fedtune.aggregate.elementwise import factored
from fedtune.aggregate.gather import Ledger, gather
from fedtune.aggregate.product import ProductSum, balanced, beyond, inner, spectrum
from fedtune.aggregate.residual import compact
from fedtune.errors import FedtuneError
from fedtune.schema import digest
from tests.aggregate.dense import adapter, apart, products

RNG = np.random.default_rng(1)


def pair(d: int, k: int, rank: int) -> Pair:
    return Pair(RNG.normal(size=(d, rank)).astype(np.float32), RNG.normal(size=(rank, k)).astype(np.float32))


def dense(of: Pair) -> np.ndarray:
    return np.float64(of.B) @ np.float64(of.A)


@pytest.mark.parametrize(
    ("d", "k", "ranks"),
    [(30, 20, (4, 4, 4)), (20, 30, (1, 2, 8)), (6, 5, (4, 4, 4, 4, 4)), (1, 7, (1, 1)), (40, 40, (3,))],
)
def test_singular_values_are_those_of_the_dense_sum(d: int, k: int, ranks: tuple[int, ...]) -> None:
    """Also where the sum of ranks passes min(d, k), and the sum is compacted on the way."""
    parts, total = [pair(d, k, rank) for rank in ranks], ProductSum()
    for i, part in enumerate(parts):
        total.add(part, 0.5 + i)
    matrix = sum((0.5 + i) * dense(part) for i, part in enumerate(parts))
    of = spectrum(total.stacked())
    np.testing.assert_allclose(of.S, np.linalg.svd(matrix, compute_uv=False)[: of.S.size], rtol=1e-10)
    np.testing.assert_allclose((of.U * of.S) @ of.Vt, matrix, atol=1e-10 * np.abs(matrix).max())
    assert sum(part.rank for _, part in total.parts) <= 2 * min(d, k)


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_truncation_is_eckart_and_young(rank: int) -> None:
    """No pair of this rank is nearer, and what is left out is known exactly."""
    whole = pair(30, 20, 6)
    u, s, vt = np.linalg.svd(dense(whole), full_matrices=False)
    of = spectrum(whole)
    made = balanced(of, rank, 2.0, "m", whole.A)
    np.testing.assert_allclose(2.0 * dense(made), (u[:, :rank] * s[:rank]) @ vt[:rank], atol=1e-9)
    assert beyond(of, rank) == pytest.approx(np.linalg.norm(2.0 * dense(made) - dense(whole)), rel=1e-9)
    np.testing.assert_allclose(
        np.linalg.norm(made.B, axis=0), np.linalg.norm(made.A, axis=1), rtol=1e-9
    )  # balanced


def test_signs_are_settled() -> None:
    """The same product from turned factors gives the same vectors, not their negatives."""
    one = pair(30, 20, 4)
    other = Pair(-one.B, -one.A)
    np.testing.assert_allclose(spectrum(one).U, spectrum(other).U, atol=1e-9)
    assert spectrum(one).U[np.abs(spectrum(one).U).argmax(axis=0), np.arange(4)].min() > 0


def test_a_sum_that_cancels_is_zero() -> None:
    one = pair(30, 20, 4)
    assert spectrum(Pair(np.concatenate([one.B, -one.B], axis=1), np.concatenate([one.A, one.A]))).S.size == 0


def test_gram_matrices_know_inner_products() -> None:
    one, other = pair(30, 20, 4), pair(30, 20, 2)
    assert inner(one, other) == pytest.approx(float(np.sum(dense(one) * dense(other))), rel=1e-5)


def test_a_large_matrix_is_factored_as_lapack_would(monkeypatch: pytest.MonkeyPatch) -> None:
    """The subspace iteration, on noise around four directions: singular values 40, 30, 20, 10 over a floor of
    about 1."""
    monkeypatch.setattr("fedtune.aggregate.elementwise.DENSE", 10)
    u, v = np.linalg.qr(RNG.normal(size=(200, 4)))[0], np.linalg.qr(RNG.normal(size=(150, 4)))[0]
    matrix = (u * [40, 30, 20, 10]) @ v.T + RNG.normal(size=(200, 150)) / 30
    full = np.linalg.svd(matrix, full_matrices=False)
    made, error = factored(matrix, 4, 1.0, "m", np.zeros((4, 150)))
    np.testing.assert_allclose(dense(made), (full[0][:, :4] * full[1][:4]) @ full[2][:4], atol=1e-4)
    assert error == pytest.approx(np.linalg.norm(full[1][4:]) / np.linalg.norm(full[1]), rel=1e-5)


def test_another_rank_of_an_adapter() -> None:
    tensors = adapter(4, 0)
    assert digest(for_rank(tensors, 2.0, 4, 2.0)) == digest(tensors)
    assert (
        apart(products(for_rank(tensors, 2.0, 4, 0.5), 0.5), products(tensors, 2.0)) < 1e-6
    )  # another scale only
    assert apart(products(for_rank(tensors, 2.0, 6, 1.0), 1.0), products(tensors, 2.0)) < 1e-6  # more room
    small = for_rank(tensors, 2.0, 2, 4.0)
    for module, product in products(tensors, 2.0).items():
        u, s, vt = np.linalg.svd(product)
        np.testing.assert_allclose(products(small, 4.0)[module], (u[:, :2] * s[:2]) @ vt[:2], atol=1e-5)
    with pytest.raises(FedtuneError, match="C102: found rank 0"):
        for_rank(tensors, 2.0, 0, 2.0)


def test_more_rank_is_room_to_train() -> None:
    """B is zero there and A is not, so the product stays and a gradient flows."""
    for name, wide in split(for_rank(adapter(2, 0), 2.0, 5, 2.0))[0].items():
        assert not wide.B[:, 2:].any(), name
        assert np.linalg.norm(wide.A[2:], axis=1).min() > 0.1


def test_compacting_to_the_rank_that_is_there() -> None:
    one = pair(30, 20, 3)
    made, lost = compact([one, one, Pair(2 * one.B, one.A)])
    assert (made.rank, lost) == (3, 0.0)
    np.testing.assert_allclose(dense(made), 4 * dense(one), atol=1e-5)
    made, lost = compact([one], 2)
    assert made.rank == 2 and lost == pytest.approx(np.linalg.svd(dense(one), compute_uv=False)[2], rel=1e-5)


def test_adapter_and_residual_become_one_stock_adapter() -> None:
    state = Combined(adapter(3, 0), {"layers.0.q": pair(12, 9, 2)})
    tensors, rank, error = as_adapter(state, 2.0, 0, 0.5)
    assert (rank, error) == (5, 0.0)
    assert apart(products(tensors, 0.5), products(state, 2.0)) < 1e-6
    tensors, rank, error = as_adapter(state, 2.0, 2, 0.5)
    assert rank == 2 and error == pytest.approx(apart(products(tensors, 0.5), products(state, 2.0)), rel=1e-5)
    with pytest.raises(FedtuneError, match="C102: found rank -1"):
        as_adapter(state, 2.0, -1)


def drift(answers: list[ClientAdapter]) -> float:
    """What a rule that notes nothing of its own reports."""
    made = gather(answers, Combined(answers[0].tensors), 1.0)
    ledger = Ledger(1.0)
    for module in made.modules():
        ledger.note(module, made=module.mean)
    return ledger.report()["drift"]


def test_drift_by_hand() -> None:
    """B = 1 or 3, A = 1 or -1 as 1 x 1 pairs: mean(B) mean(A) = 2 * 0, mean(BA) = (1 - 3) / 2 = -1, so all of
    it is lost."""
    answers = [
        ClientAdapter(
            i,
            {
                "m.lora_A.weight": np.full((1, 1), a, np.float32),
                "m.lora_B.weight": np.full((1, 1), b, np.float32),
            },
        )
        for i, (b, a) in enumerate([(1, 1), (3, -1)])
    ]
    assert drift(answers) == pytest.approx(1.0)
    assert drift(answers[:1]) == pytest.approx(0.0, abs=1e-8)

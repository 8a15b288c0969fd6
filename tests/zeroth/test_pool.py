"""The claims of decision 0004, the shape of each family, and sums of directions."""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.errors import FedtuneError
from fedtune.zeroth import Pool, combine, kernels, normal
from fedtune.zeroth.philox import ROTATION, bits, words
from fedtune.zeroth.pool import wht
from tests.zeroth import oracle

COUNT = 1 << 18


def hadamard(size: int) -> np.ndarray:
    """Sylvester's matrix by doubling: (size, size)."""
    matrix = np.ones((1, 1), np.int64)
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix


def test_the_transform_is_sylvesters_matrix() -> None:
    values = np.random.default_rng(0).integers(-(2**40), 2**40, 64)
    assert np.array_equal(wht(values), hadamard(64) @ values)
    compiled = values.copy()
    kernels.wht(compiled)
    assert np.array_equal(compiled, wht(values))
    assert np.array_equal(wht(wht(values)), 64 * values)


@pytest.mark.parametrize("k", [0, 1, 77, 1023])
def test_claim_1_a_direction_alone_is_independent_signs(k: int) -> None:
    pool = Pool(4, 1024)
    z = pool.direction(k, 0, COUNT)
    fixed = 1 - 2 * (np.bitwise_count(pool.places(0, COUNT) & np.uint64(k)) % 2).astype(
        int
    )  # a function of the rotations: nothing of r is in it
    assert np.array_equal(z * fixed, 1 - 2 * bits(4, 0, 0, 0, COUNT).astype(int))
    assert abs(z.mean()) < 4 / COUNT**0.5
    for lag in (1, 2, 31, 32, 128, 1024):
        assert abs((z[lag:].astype(int) * z[:-lag]).mean()) < 4 / (COUNT - lag) ** 0.5
    frequencies = np.bincount(np.packbits(z < 0), minlength=256)
    chi = ((frequencies - COUNT / 8 / 256) ** 2).sum() / (COUNT / 8 / 256)
    assert abs(chi - 255) < 4 * 510**0.5


@pytest.mark.parametrize(("size", "offset"), [(32, 0), (64, 64 * 5), (256, 2**40)])
def test_claim_2_directions_are_exactly_orthogonal_over_whole_spans(size: int, offset: int) -> None:
    pool = Pool(11, size)
    z = np.stack([pool.direction(k, offset, 3 * size) for k in range(size)]).astype(int)
    assert np.array_equal(z @ z.T, 3 * size * np.eye(size, dtype=int))
    rest = np.stack([pool.direction(k, offset, 3 * size + 7) for k in range(size)]).astype(int)
    gram = rest @ rest.T - np.diag(np.full(size, 3 * size + 7))
    assert 0 < np.abs(gram).max() <= 7  # what an unfinished span leaves, and no more


@given(st.sampled_from(oracle.POOLS), st.integers(0, 2**45), st.integers(1, 300), st.integers(0, 2**32))
@settings(max_examples=40)
def test_claim_3_a_sum_of_all_directions_is_one_transform_and_one_pass(
    pool: Pool, offset: int, count: int, seed: int
) -> None:
    accumulators = np.random.default_rng(seed).integers(-(2**30), 2**30, pool.size)
    total = combine(pool, accumulators, offset, count)
    for i in (0, count // 2, count - 1):
        if pool.size <= 256:
            assert total[i] == sum(
                int(a) * oracle.value(pool, k, offset + i) for k, a in enumerate(accumulators)
            )
    few = np.where(np.arange(pool.size) < 5, accumulators, 0)
    assert np.array_equal(
        combine(pool, few, offset, count),
        sum(int(few[k]) * pool.direction(k, offset, count).astype(int) for k in range(5)),
    )


def test_rotations_are_uniform_and_differ_between_pools() -> None:
    turns = words(1, ROTATION, 0, 0, 1 << 16) % 64
    frequencies = np.bincount(turns, minlength=64)
    assert abs(((frequencies - 1024) ** 2).sum() / 1024 - 63) < 4 * 126**0.5
    assert not np.array_equal(Pool(1, 64).places(0, 6400), Pool(2, 64).places(0, 6400))


@pytest.mark.parametrize(
    ("pool", "kurtosis"),
    [(Pool(1, 64), 1.0), (Pool(1, 64, "independent"), 1.0), (Pool(1, 64, "independent", "gaussian"), 2.9175)],
)
def test_mean_variance_and_kurtosis_of_each_family(pool: Pool, kurtosis: float) -> None:
    z = pool.unit * np.concatenate([pool.direction(k, 0, COUNT) for k in (0, 7, 63)])
    assert abs(z.mean()) < 4 / z.size**0.5
    assert abs((z**2).mean() - 1) < 0.006
    assert abs((z**4).mean() / (z**2).mean() ** 2 - kurtosis) < 0.02


def test_independent_directions_are_nearly_orthogonal() -> None:
    for directions in ("rademacher", "gaussian"):
        pool = Pool(6, 32, "independent", directions)
        z = pool.unit * np.stack([pool.direction(k, 0, 1 << 16) for k in range(32)]).astype(float)
        gram = z @ z.T / (1 << 16)
        assert np.abs(gram - np.eye(32)).max() < 5 / 256


def test_the_normal_table_is_the_rounded_quantiles() -> None:
    exact = [round(512 * NormalDist().inv_cdf((b + 0.5) / 256)) for b in range(256)]
    assert normal.TABLE.tolist() == exact
    assert np.array_equal(normal.TABLE, -normal.TABLE[::-1])
    assert int((normal.TABLE.astype(int) ** 2).sum()) == 66766932
    assert (normal.UNIT * normal.TABLE.astype(float)).std() == pytest.approx(1, abs=1e-15)


@pytest.mark.parametrize("pool", oracle.POOLS)
def test_a_direction_of_a_slice_is_the_slice(pool: Pool) -> None:
    whole = pool.direction(3, 1000, 20000)
    for offset, count in ((0, 1), (1, 31), (95, 8193), (19999, 1)):
        assert np.array_equal(pool.direction(3, 1000 + offset, count), whole[offset : offset + count])


def test_what_a_pool_cannot_be_and_what_it_cannot_sum() -> None:
    for wrong in (
        {"key": -1, "size": 64},
        {"key": 0, "size": 16},
        {"key": 0, "size": 96},
        {"key": 0, "size": 64, "directions": "gaussian"},
    ):
        with pytest.raises(ValueError, match="pool"):
            Pool(**wrong)
    with pytest.raises(ValueError, match="direction 64"):
        Pool(0, 64).direction(64, 0, 1)
    with pytest.raises(ValueError, match="accumulators are float64"):
        combine(Pool(0, 64), np.zeros(64), 0, 1)
    with pytest.raises(FedtuneError) as caught:
        combine(Pool(0, 64), np.full(64, 2**47), 0, 1)
    assert caught.value.code == "W606"
    with pytest.raises(FedtuneError):
        combine(Pool(0, 64), np.full(64, -(2**63)), 0, 1)
    assert np.abs(combine(Pool(0, 64), np.full(64, 2**47 - 1), 0, 640)).max() == 64 * (2**47 - 1)

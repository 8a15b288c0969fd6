"""Steps times a curvature: against formulas in numpy, on both sides, in any split, and replayed as they were
walked."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fedtune.zeroth import Layout, Pool, curvature, replay, walk

KINDS: list[tuple[Any, Any]] = [
    ("hadamard", "rademacher"),
    ("independent", "rademacher"),
    ("independent", "gaussian"),
]
SHAPES = {"b": (70_000,), "a": (3, 50)}  # more than a tile; and an offset that is no multiple of anything


def pools(kind: Any, directions: Any) -> list[tuple[Pool, np.ndarray]]:
    draw = np.random.default_rng(0)
    return [
        (Pool(key, 64, kind, directions), draw.integers(-500, 500, 64) * draw.integers(0, 2, 64))
        for key in (3, 4, 5)
    ]


def values() -> dict[str, np.ndarray]:
    draw = np.random.default_rng(1)
    return {name: draw.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}


def sums(pool: Pool, accumulators: np.ndarray, count: int) -> np.ndarray:
    """S from single directions, one after the other."""
    return sum(a * pool.direction(k, 0, count).astype(np.int64) for k, a in enumerate(accumulators.tolist()))  # type: ignore[return-value]


def expected(
    parts: list[tuple[Pool, np.ndarray]], scale: float
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The rebuilt model and the factor of what would come next, over the whole flat vector."""
    layout = Layout.of(SHAPES)
    flat = np.concatenate([value.reshape(-1) for _, value in sorted(values().items())])
    factor, v, m = np.ones(len(flat)), np.zeros(len(flat)), 0.0
    for pool, accumulators in parts:
        s = sums(pool, accumulators, len(flat)).astype(np.float64)
        term = (s * (scale * pool.unit) * factor).astype(np.float32)
        flat = np.where(term == 0, flat, flat + term)
        v, m = v + s * s, m + sum(a * a for a in accumulators.tolist()) / pool.unit**2
        factor = np.sqrt(2 * m / (v + m)).astype(np.float32).astype(np.float64)
    cut = {name: slice(layout.offsets[name], layout.offsets[name] + layout.sizes[name]) for name in SHAPES}
    return {n: flat[c].reshape(SHAPES[n]) for n, c in cut.items()}, {
        n: factor[c].reshape(SHAPES[n]).astype(np.float32) for n, c in cut.items()
    }


@pytest.mark.parametrize(("kind", "directions"), KINDS)
@pytest.mark.parametrize("where", ["cpu", "device", "two threads"])
def test_a_bent_replay_and_its_factors_are_the_formula_to_the_bit(
    kind: Any, directions: Any, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedtune.zeroth import apply, cpu, device

    if where == "device":
        monkeypatch.setattr(
            cpu,
            "adder",
            lambda pool, numbers: (
                lambda at, piece: device.adder(pool, numbers)(at, torch.from_numpy(piece)).numpy()
            ),
        )
    if where == "two threads":
        monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
        monkeypatch.setattr(apply, "SPLIT", 1 << 16)
    parts, scale = pools(kind, directions), 1e-4
    model, factors = expected(parts, scale)
    base = {name: torch.from_numpy(value) for name, value in values().items()}
    named = {name: torch.empty_like(value) for name, value in base.items()}
    replay(named, parts, scale, base=base, bent=True)
    found = curvature(named, parts)
    for name in SHAPES:
        np.testing.assert_array_equal(named[name].numpy(), model[name])
        np.testing.assert_array_equal(np.asarray(found[name]), factors[name])
        assert 0 < float(factors[name].min()) < 0.8 < 1.2 < float(factors[name].max()) < 2**0.5


def test_the_other_side_has_the_same_operations() -> None:
    """device.py's work on CPU tensors, as on a GPU: the bits of cpu.py."""
    from fedtune.zeroth import curved, device
    from fedtune.zeroth.pool import bounded

    parts = bounded(pools("hadamard", "rademacher"))
    start = torch.from_numpy(np.concatenate([value.reshape(-1) for _, value in sorted(values().items())]))
    out, by = torch.empty_like(start), torch.empty_like(start)
    curved.summed(device, parts, 1e-4)(out, start, 0)
    curved.factors(device, parts)(by, None, 0)
    curved.along(device, parts[0][0], [(7, 0.25), (8, -0.5)])(out, by, 0)
    named = {name: torch.from_numpy(value.copy()) for name, value in values().items()}
    replay(named, parts, 1e-4, bent=True)
    walk(named, parts[0][0], [(7, 0.25), (8, -0.5)], by=curvature(named, parts))
    np.testing.assert_array_equal(
        out.numpy(), np.concatenate([named[name].reshape(-1).numpy() for name in sorted(named)])
    )


@pytest.mark.parametrize(("kind", "directions"), KINDS)
def test_a_walk_along_one_direction_is_what_its_replay_says(kind: Any, directions: Any) -> None:
    """Three pools, then one step of 300 units along direction 9 of a fourth: in place, or rebuilt with an
    accumulator of 300."""
    parts, scale, pool = pools(kind, directions), 2.0**-20, Pool(6, 64, kind, directions)
    named = {name: torch.from_numpy(value) for name, value in values().items()}
    replay(named, parts, scale, bent=True)
    walk(named, pool, [(9, 300 * scale)], by=curvature(named, parts))
    again = {name: torch.from_numpy(value) for name, value in values().items()}
    one = np.zeros(64, np.int64)
    one[9] = 300
    replay(again, [*parts, (pool, one)], scale, bent=True)
    for name in SHAPES:
        np.testing.assert_array_equal(named[name].numpy(), again[name].numpy())


def test_before_anything_has_moved_the_factor_is_one() -> None:
    named = values()
    for parts in ([], [(Pool(1, 64), np.zeros(64, np.int64))]):
        assert all((np.asarray(value) == 1).all() for value in curvature(named, parts).values())


def test_steps_times_a_curvature_need_float32() -> None:
    half = {"x": torch.zeros(8, dtype=torch.bfloat16)}
    with pytest.raises(ValueError, match="float32"):
        walk(half, Pool(1, 64), [(0, 1.0)], by={"x": torch.ones(8)})

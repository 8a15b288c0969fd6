"""Perturb, replay and project over the tensors of a model: the oracle's bits, whatever the device's code,
threads, tiling, shard, order or type."""

from __future__ import annotations

import hashlib
import tracemalloc
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.errors import FedtuneError
from fedtune.schema import Schema
from fedtune.zeroth import Layout, Pool, apply, combine, cpu, device, project, replay, views, walk, write
from fedtune.zeroth.pool import wht
from tests.zeroth import oracle
from tests.zeroth.oracle import perturb

SHAPES = {"c": (3, 5), "a": (1,), "b": (70, 99), "d": (9001,)}
LAYOUT = Layout.of(SHAPES)


def values(dtype: torch.dtype = torch.float32, seed: int = 1) -> dict[str, torch.Tensor]:
    rng = np.random.default_rng(seed)
    return {
        name: torch.from_numpy(rng.standard_normal(shape, np.float32) * np.float32(0.02)).to(dtype)
        for name, shape in SHAPES.items()
    }


def joined(named: dict[str, Any]) -> np.ndarray:
    return np.concatenate([np.asarray(named[name]).reshape(-1) for name in sorted(named)])


def some(pool: Pool, seed: int = 0, most: int = 2**20) -> np.ndarray:
    return np.random.default_rng(seed).integers(-most, most, pool.size)


@pytest.fixture(params=["compiled", "torch"])
def road(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The kernels for the CPU, or the operations that run on any device (here on the CPU)."""
    if request.param == "torch":
        monkeypatch.setattr(apply, "flat", lambda name, value: torch.as_tensor(value).detach().view(-1))
    return str(request.param)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("pool", oracle.POOLS)
def test_perturb_is_the_oracle(pool: Pool, road: str) -> None:
    named, before = values(), joined(values())
    perturb(named, pool, 7, -1e-3)
    z = pool.direction(7, 0, LAYOUT.count)
    assert oracle.same(joined(named), oracle.weight(before, z, -1e-3 * pool.unit))
    moved = named
    named = values(seed=2)
    perturb(named, pool, 7, -1e-3, base=values())
    assert oracle.same(joined(named), joined(moved))


@pytest.mark.parametrize("pool", oracle.POOLS)
def test_a_walk_is_its_moves_one_by_one(pool: Pool, road: str) -> None:
    moves = [(7, 1e-3), (7, -2e-3), (pool.size - 1, 5e-4)]
    together, single = values(), values()
    walk(views(together), pool, moves)
    for k, step in moves:
        perturb(single, pool, k, step)
    assert oracle.same(joined(together), joined(single))
    walk(single, pool, [])
    assert oracle.same(joined(together), joined(single))
    other = values(seed=2)
    walk(other, pool, moves, base=values())
    assert oracle.same(joined(other), joined(single))


@pytest.mark.parametrize("pool", oracle.POOLS)
def test_replay_is_the_oracle_from_a_base_or_in_place(pool: Pool, road: str) -> None:
    accumulators, scale = some(pool), 3e-9
    expected = oracle.weight(
        joined(values()), combine(pool, accumulators, 0, LAYOUT.count), scale * pool.unit
    )
    named = values()
    replay(named, [(pool, accumulators.astype(np.int32))], scale)
    assert oracle.same(joined(named), expected)
    named = values(seed=2)
    replay(named, [(pool, accumulators)], scale, base=values())
    assert oracle.same(joined(named), expected)


@pytest.mark.parametrize("pool", oracle.POOLS)
def test_pools_are_added_as_whole_numbers_in_one_pass(pool: Pool, road: str) -> None:
    second = Pool(99, pool.size * 2, pool.kind, pool.directions)
    sums = [(pool, some(pool)), (second, some(second, 1))]
    whole = sum(combine(p, a, 0, LAYOUT.count) for p, a in sums)
    named = values()
    replay(named, sums, 1e-9)
    assert oracle.same(joined(named), oracle.weight(joined(values()), whole, 1e-9 * pool.unit))
    if pool.directions == "rademacher":  # and pools of both kinds together
        third = Pool(7, 64, "independent" if pool.kind == "hadamard" else "hadamard")
        replay(named, [*sums, (third, some(third, 2))], 1e-9, base=values())
        assert oracle.same(
            joined(named),
            oracle.weight(joined(values()), whole + combine(third, some(third, 2), 0, LAYOUT.count), 1e-9),
        )


@given(st.sampled_from(oracle.POOLS), st.integers(0, 2**45), st.integers(1, 9000), st.integers(0, 2**31))
@settings(max_examples=40)
def test_compiled_and_torch_agree_at_any_offset_and_length(
    pool: Pool, offset: int, count: int, seed: int
) -> None:
    layout = Layout({"x": offset}, {"x": count}, offset + count)
    base = np.random.default_rng(seed).standard_normal(count, np.float32)
    accumulators, k = some(pool, seed), seed % pool.size
    for compiled, portable in (
        (cpu.along(pool, [(k, 0.1), (0, 0.2)]), device.along(pool, [(k, 0.1), (0, 0.2)])),
        (cpu.summed([(pool, accumulators)], 1e-5), device.summed([(pool, accumulators)], 1e-5)),
    ):
        results = [base.copy() for _ in range(2)]
        compiled(results[0], None, offset)
        portable(torch.from_numpy(results[1]), None, offset)
        assert oracle.same(*results)
    named = {"x": base.copy()}
    perturb(named, pool, k, 0.1, layout=layout)
    assert oracle.same(named["x"], oracle.weight(base, pool.direction(k, offset, count), 0.1 * pool.unit))
    assert np.array_equal(
        cpu.gathered(pool, base, offset, 2.0**20),
        device.gathered(pool, torch.from_numpy(base), offset, 2.0**20),
    )


@pytest.mark.parametrize("pool", oracle.POOLS)
def test_threads_and_tiles_change_nothing(pool: Pool, threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = set()
    for count, split, length in ((1, 1 << 20, 1 << 15), (2, 1 << 12, 1 << 15), (3, 1000, 777)):
        torch.set_num_threads(count)
        monkeypatch.setattr(apply, "SPLIT", split)
        monkeypatch.setattr(cpu, "LENGTH", length)
        named = values()
        perturb(named, pool, 1, 1e-3)
        replay(named, [(pool, some(pool))], 1e-9)
        replay(named, [(pool, some(pool)), (pool, some(pool, 4))], 1e-9)
        seen.add(hashlib.sha256(joined(named).tobytes() + project(named, pool).tobytes()).hexdigest())
    assert len(seen) == 1


def test_order_of_loading_and_shards_change_nothing(road: str) -> None:
    pool = oracle.POOLS[2]
    whole = values()
    perturb(whole, pool, 5, 1e-3)
    turned = {name: values()[name] for name in ("d", "b", "c", "a")}
    perturb(turned, pool, 5, 1e-3)
    assert oracle.same(joined(turned), joined(whole))
    schema = Schema(tuple(sorted(SHAPES.items())))
    assert Layout.of(schema) == Layout.of(whole) == LAYOUT
    for name in SHAPES:
        part = {name: values()[name]}
        perturb(part, pool, 5, 1e-3, layout=LAYOUT)
        assert oracle.same(part[name].numpy(), whole[name].numpy())
    fused = {"all": torch.from_numpy(joined(values()))}  # one tensor with the same values in the same order
    perturb(fused, pool, 5, 1e-3)
    assert oracle.same(joined(fused), joined(whole))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pool", [oracle.POOLS[1], oracle.POOLS[4]])
def test_a_working_copy_of_half_the_bytes_is_a_cast(pool: Pool, dtype: torch.dtype, road: str) -> None:
    exact = values()
    perturb(exact, pool, 3, 1e-2, base=values())
    working = values(dtype)
    perturb(working, pool, 3, 1e-2, base=values())
    assert all(torch.equal(working[name], exact[name].to(dtype)) for name in SHAPES)
    replay(
        exact, [(pool, some(pool))], 1e-8, base=values(dtype)
    )  # first values of half the bytes, as many checkpoints have, to float32
    wide = {name: value.float() for name, value in values(dtype).items()}
    replay(wide, [(pool, some(pool))], 1e-8)
    assert oracle.same(joined(exact), joined(wide))
    replay(working, [(pool, some(pool))], 1e-8, base=values(dtype))
    assert all(torch.equal(working[name], wide[name].to(dtype)) for name in SHAPES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_replay_is_what_its_table_writes(dtype: torch.dtype, road: str) -> None:
    pool = oracle.POOLS[2]
    table = (1e-8 * wht(some(pool)).astype(np.float64)).astype(np.float32)
    written, replayed = values(dtype), values(dtype)
    write(written, pool, table, base=values(dtype, 3))
    replay(replayed, [(pool, some(pool))], 1e-8, base=values(dtype, 3))
    assert all(torch.equal(written[name], replayed[name]) for name in SHAPES)
    for wrong, t in ((oracle.POOLS[3], table), (pool, table[1:]), (pool, table.astype(np.float64))):
        with pytest.raises(ValueError, match="it needs float32"):
            write(written, wrong, t, base=replayed)


def test_a_term_of_zero_leaves_every_bit(road: str) -> None:
    odd = np.array([-0.0, 0.0, 1.0, -1.0, np.inf, np.nan, 1e-45] * 100, np.float32)
    pool = Pool(1, 64)
    for sums in ([], [(pool, np.zeros(64, int))], [(pool, np.zeros(64, int))] * 2):
        for scale in (1.0, -1.0):
            named = {"x": odd.copy()}
            replay(named, sums, scale)
            assert oracle.same(named["x"], odd)
            fresh = {"x": np.ones_like(odd)}
            replay(fresh, sums, scale, base={"x": odd})
            assert oracle.same(fresh["x"], odd)
    one = np.eye(1, 64, 3, dtype=int)[0]  # S is +-1 everywhere, and the term is below the smallest float32
    named = {"x": odd.copy()}
    replay(named, [(pool, one)], 1e-60)
    perturb(named, pool, 3, 0.0)
    assert oracle.same(named["x"], odd)


@pytest.mark.parametrize("pool", oracle.POOLS)
def test_project_is_the_transpose_of_replay(pool: Pool, road: str) -> None:
    """<A, v> = sum_k A_k <z_k, x> = <S, x>: exact in whole numbers, for x that are whole multiples of
    1/64."""
    rng = np.random.default_rng(3)
    named = {
        name: torch.from_numpy(rng.integers(-640, 640, shape).astype(np.float32) / 64)
        for name, shape in SHAPES.items()
    }
    found = project(named, pool)
    accumulators = some(pool)
    whole = [round(64 * float(v) / pool.unit) for v in found]
    assert found.dtype == np.float64
    assert np.allclose(np.asarray(whole) * pool.unit / 64, found, rtol=1e-14)
    total = combine(pool, accumulators, 0, LAYOUT.count)
    x = (64 * joined(named)).astype(int)
    assert sum(int(a) * v for a, v in zip(accumulators, whole, strict=True)) == sum(
        int(s) * int(n) for s, n in zip(total, x, strict=True)
    )


@pytest.mark.parametrize("pool", oracle.POOLS)
def test_project_is_each_direction_times_the_update(pool: Pool) -> None:
    named = values()
    found, x = project(named, pool), joined(named).astype(np.float64)
    for k in (0, 1, pool.size - 1):
        assert found[k] == pytest.approx(pool.unit * pool.direction(k, 0, LAYOUT.count) @ x, abs=1e-9)
    assert not project({"x": torch.zeros(100)}, pool).any()
    for size in (1e-42, 1e30):  # any size that float32 has
        tiny = project({"x": torch.full((100,), size)}, pool)
        assert tiny[0] == pytest.approx(
            float(np.float32(size)) * pool.unit * int(pool.direction(0, 0, 100).astype(int).sum()),
            rel=1e-6,
            abs=0,
        )


def test_replay_is_linear_in_the_accumulators() -> None:
    pool, other = oracle.POOLS[1], oracle.POOLS[3]
    for p in (pool, other):
        a, b = some(p), some(p, 1)
        total = combine(p, a, 5, 300) + 3 * combine(p, b, 5, 300)
        assert np.array_equal(combine(p, a + 3 * b, 5, 300), total)
    assert np.array_equal(wht(some(pool) + some(pool, 1)), wht(some(pool)) + wht(some(pool, 1)))


def test_a_walk_is_what_replay_rebuilds() -> None:
    """Steps of whole scalars, one after the other, and their sums by seed: the same weights up to the
    rounding of each step; exactly where that is exact."""
    pool, unit = Pool(8, 64), 2.0**-20
    start = {
        "x": torch.from_numpy(
            np.random.default_rng(0).integers(-(2**9), 2**9, 5000).astype(np.float32) / 2**10
        )
    }
    walked = {"x": start["x"].clone()}
    accumulators = np.zeros(64, np.int64)
    for step in range(20):
        k, scalar = step * 7 % 64, (-1) ** step * (step + 1)
        perturb(walked, pool, k, unit * scalar)
        accumulators[k] += scalar
    rebuilt = {"x": torch.empty(5000)}
    replay(rebuilt, [(pool, accumulators)], unit, base=start)
    assert oracle.same(walked["x"].numpy(), rebuilt["x"].numpy())


def test_nothing_of_a_tensors_size_is_allocated() -> None:
    """4M parameters, 16 MB: what numpy allocates stays below half a megabyte (torch's scratch is CAST or less
    and is not traced)."""
    pool = Pool(1, 4096)
    named, base = {"x": torch.zeros(1 << 22)}, {"x": torch.ones(1 << 22)}
    accumulators = some(pool)
    tracemalloc.start()
    perturb(named, pool, 1, 1e-3)
    replay(named, [(pool, accumulators)], 1e-6, base=base)
    replay(named, [(pool, accumulators), (Pool(2, 4096), accumulators)], 1e-6, base=base)
    project(named, pool)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 19


def test_what_cannot_be_done_is_refused_before_anything_moves() -> None:
    pool, named = Pool(1, 64), values()
    for wrong in ({"k": 64}, {"k": -1}, {"step": float("nan")}, {"step": float("inf")}):
        with pytest.raises(ValueError, match="a step is finite"):
            perturb(named, pool, **({"k": 0, "step": 1.0} | wrong))
    with pytest.raises(ValueError, match="a scale is finite"):
        replay(named, [(pool, some(pool))], float("nan"))
    with pytest.raises(ValueError, match="same directions"):
        replay(named, [(pool, some(pool)), (Pool(1, 64, "independent", "gaussian"), some(pool))], 1.0)
    with pytest.raises(FedtuneError) as caught:
        replay(named, [(pool, np.full(64, 2**46))] * 3, 1.0)
    assert caught.value.code == "W606"
    with pytest.raises(ValueError, match="without a base"):
        perturb(values(torch.bfloat16), pool, 0, 1.0)
    with pytest.raises(ValueError, match="'a' has 1 values"):
        perturb(named, pool, 0, 1.0, layout=Layout.of({**SHAPES, "a": (2,)}))
    with pytest.raises(FedtuneError, match="not contiguous") as caught:
        perturb({**named, "b": named["b"].T}, pool, 0, 1.0)
    assert caught.value.code == "M305"
    for bad in (float("nan"), float("inf"), -float("inf")):
        with pytest.raises(FedtuneError) as caught:
            project({"x": torch.tensor([1.0, bad, 0.0])}, pool)
        assert caught.value.code == "W607"
    assert oracle.same(joined(named), joined(values()))

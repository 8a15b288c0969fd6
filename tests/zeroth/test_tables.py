"""What a pass over the weights of a GPU costs: operations that are started, and what is kept between passes. Its
bits are compared in test_apply.py."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fedtune.zeroth import Pool, apply, device, tables


class Operations(TorchDispatchMode):
    """How many are started; views start none."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        self.count += not function.is_view
        return out


def started(work: Callable[..., None], out: torch.Tensor, base: torch.Tensor | None = None) -> int:
    work(out, base, 0)  # what belongs to the pool is drawn once
    with Operations() as operations:
        work(out, base, 0)
    return operations.count


POOL = Pool(5, 4096)
ONE_TILE = 100_000


@pytest.mark.parametrize("base", [None, torch.ones(ONE_TILE)], ids=["in place", "from a base"])
def test_a_pass_is_a_dozen_operations(base: torch.Tensor | None) -> None:
    """And not hundreds: of a tile, whatever the size of the pool."""
    out, accumulators = torch.zeros(ONE_TILE), np.random.default_rng(0).integers(1, 99, POOL.size)
    moves = started(device.along(POOL, [(7, 1e-3)]), out, base)
    assert moves <= 12
    assert started(device.along(POOL, [(7, 1e-3), (9, -1e-3), (1, 2e-3)]), out, base) <= moves + 2 * 3
    assert started(device.summed([(POOL, accumulators)], 1e-6), out, base) <= 14
    two = started(device.along(POOL, [(7, 1e-3)]), torch.zeros(2 * tables.TILE))
    assert two <= 2 * moves


def test_a_pass_over_a_model_is_a_launch_for_each_pair_of_types(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is a kernel for the device, however many tensors there are; none is copied."""
    launches: list[list[tuple[torch.Tensor, Any, int]]] = []
    kernel = SimpleNamespace(onto=lambda pool, tables, pieces: launches.append(pieces))
    monkeypatch.setattr(tables, "fused", lambda *about: kernel)
    monkeypatch.setattr(apply, "flat", lambda name, value: value.view(-1))
    of = {f"{n:02}": (torch.bfloat16 if n % 5 else torch.float32) for n in range(20)}
    named = {name: torch.empty(n, 3, dtype=kind, device="meta") for n, (name, kind) in enumerate(of.items())}
    base = {name: value.clone() for name, value in named.items()}
    table = np.ones(POOL.size, np.float32)
    for work in (
        lambda: apply.write(named, POOL, table, base=base),
        lambda: apply.replay(named, [(POOL, table.astype(int))], 1e-3, base=base),
        lambda: apply.walk(named, POOL, [(1, 1e-3), (2, 1e-3)], base=base),
    ):
        launches.clear()
        work()
        assert sorted(map(len, launches)) == [3, 16]  # the first has no values
        offsets = {offset for pieces in launches for _, _, offset in pieces}
        assert offsets == set(apply.Layout.of(named).offsets.values()) and all(
            first.data_ptr() == out.data_ptr() == 0 and first.dtype == out.dtype
            for pieces in launches
            for out, first, _ in pieces
        )


def test_what_is_kept_is_a_bit_a_parameter() -> None:
    words = tables.sign_words(POOL.key, 3, tables.TILE, torch.device("cpu"))
    assert words.nbytes * 8 == tables.TILE
    assert tables.sign_words(POOL.key, 3, tables.TILE, torch.device("cpu")) is words


@pytest.mark.parametrize("size", [32, 1 << 12, 1 << 20])
@pytest.mark.parametrize("offset", [0, 1, tables.TILE - 3, 5 * tables.TILE + 17, (1 << 40) + 9])
def test_rows_and_signs_are_the_pools(size: int, offset: int) -> None:
    pool, here = Pool(11, size), torch.device("cpu")
    count = min(2000, tables.TILE - offset % tables.TILE)
    assert (
        tables.rows(pool, offset, count, here).numpy() == pool.places(offset, count).astype(np.int64)
    ).all()
    flips = tables.flips(pool, offset, count, here).numpy()
    direction = pool.direction(0, offset, count)  # whose transform is 1 everywhere
    assert ((flips < 0) == (direction < 0)).all() and set(flips.tolist()) <= {0, tables.NEGATIVE}


def test_tiles_keep_to_the_grid() -> None:
    for offset, count in ((0, 100), (3, 100), (16, 16), (15, 2), (7, 1)):
        parts = list(tables.tiles(offset, count, 16))
        assert [at for at, _ in parts] + [count] == [0, *(end for _, end in parts)]
        assert all((offset + at) // 16 == (offset + end - 1) // 16 for at, end in parts)


def test_tensors_of_a_device_are_neither_cut_nor_shared_among_threads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Threads would only wait for one another's turn to start an operation."""
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        named = {"a": torch.zeros(3 * apply.SPLIT, device="meta"), "b": torch.zeros(9, device="meta")}
        monkeypatch.setattr(apply, "flat", lambda name, value: value.view(-1))
        parts = list(apply.pieces(named, None, apply.Layout.of(named)))
        assert [len(out) for out, _, _ in parts] == [3 * apply.SPLIT, 9]
        monkeypatch.setattr(apply, "ThreadPoolExecutor", None)
        assert list(apply.spread(lambda part: len(part[0]), parts)) == [3 * apply.SPLIT, 9]
    finally:
        torch.set_num_threads(threads)

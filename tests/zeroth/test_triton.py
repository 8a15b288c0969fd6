"""The Triton kernel without a GPU: its bits, interpreted, are those of the kernels for the CPU, and its code,
compiled for real cards, adds floats and does nothing else with them."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from fedtune.zeroth import Pool, cpu, device, tables
from fedtune.zeroth.pool import Work
from tests.forked import Program

pytest.importorskip("triton", reason="Triton is there on Linux alone, with torch or with fedtune's tests")

TYPES = [torch.float32, torch.bfloat16, torch.float16]
PLACES = [  # pool, offset and number of parameters
    (Pool(7, 32), 33, 100),
    (Pool(2**63 + 12345, 1 << 12), 0, 1024),
    (Pool(2**63 + 12345, 1 << 12), 5 * 2**33 + 4095, 1),
    (Pool(2**63 + 12345, 1 << 12), 4 * 4096 - 477, 1101),
    (Pool(11, 1 << 14), 2**40 + 31, 700),  # here from every type to every type
]


def in_a_process(check: str, folder: Path, **environment: str) -> str:
    """A function of this file, where Triton can be told what to do before it is imported; what it printed."""
    program = f"from tests.zeroth import test_triton; test_triton.{check}()"
    done = Program("-c", program, TRITON_CACHE_DIR=str(folder), **environment).finish()
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def values(count: int, seed: int = 1) -> torch.Tensor:
    """With zeros of both signs, subnormal numbers, and what has no size."""
    found = torch.from_numpy(
        np.random.default_rng(seed).standard_normal(count, np.float32) * np.float32(0.02)
    )
    for first, odd in enumerate((0.0, -0.0, 1e-41, torch.inf, torch.nan, 3e38, 65519.0)):
        found[first::17] = odd
    return found


def bits(value: torch.Tensor) -> bytes:
    return bytes(torch.where(value.isnan(), 0.5, value).view(torch.uint8).numpy().data)


def interpreted(chunk: int) -> None:
    """The kernel on the CPU, where an interpreted program takes a millisecond even if it has nothing to do."""
    from fedtune.zeroth import triton_tables

    tables.FUSED_ON, triton_tables.CHUNK = "cpu", chunk


def check_bits() -> None:
    for pool, offset, count in PLACES:
        interpreted(min(1024, pool.size))
        accumulators = np.random.default_rng(0).integers(-20_000, 20_000, pool.size)
        moves = [(3, 1e-3), (pool.size - 1, -3e-7), (0, 0.0)]
        replay = [code.summed([(pool, accumulators)], 3e-9) for code in (cpu, device)]
        walk = [code.along(pool, moves) for code in (cpu, device)]
        for out, base in itertools.product(TYPES, TYPES) if count == 700 else zip(TYPES, TYPES, strict=True):
            compare(*replay, values(count).to(base), out, offset)
            compare(*walk, values(count).to(base), out, offset)
            assert tables.fused(pool.size, torch.device("cpu"), out, base)  # it was the kernel


def check_many() -> None:
    """Tensors of several chunks, of none, and of an address that nothing wide can reach, in any order."""
    interpreted(2048)
    pool, kept = Pool(2**63 + 5, 1 << 12), values(9000)
    table = np.random.default_rng(0).standard_normal(pool.size).astype(np.float32)
    sizes = {4100: 3000, 7: 1, 8000: 2048, 12: 0, 20_000: 700}  # by offset
    for start in (0, 1):
        pieces, expected, at = [], [], start
        for offset, count in sizes.items():
            base, at = kept[at : at + count], at + count
            pieces.append((torch.ones(count), base, offset))
            expected.append(base.clone())
            cpu.from_table(pool, table)(expected[-1].numpy(), None, offset)
        tables.Onto(pool, [table]).together(pieces)
        assert all(bits(out) == bits(one) for (out, _, _), one in zip(pieces, expected, strict=True))


def compare(compiled: Work, fused: Work, base: torch.Tensor, out: torch.dtype, offset: int) -> None:
    """From a base and, in its type, in place."""
    wide, found = base.to(torch.float32, copy=True), torch.ones(len(base), dtype=out)
    compiled(wide.numpy(), None, offset)
    fused(found, base, offset)
    assert bits(found) == bits(wide.to(out)), (len(base), offset, base.dtype, out)
    if base.dtype == out:
        fused(base, None, offset)
        assert bits(base) == bits(found), (len(base), offset, out, "in place")


@pytest.mark.parametrize("check", ["check_bits", "check_many"])
def test_interpreted_it_has_the_bits_of_the_cpu(check: str, tmp_path: Path) -> None:
    in_a_process(check, tmp_path, TRITON_INTERPRET="1")


@pytest.mark.parametrize("fails", ["no GPU", "other bits"])
def test_where_it_fails_torchs_operations_do_the_work(fails: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from fedtune.zeroth import triton_tables

    pool, moves, out = Pool(9, 64), [(3, 1e-3)], values(500)
    expected = out.numpy().copy()
    cpu.along(pool, moves)(expected, None, 5)
    if fails == "other bits":
        monkeypatch.setattr(triton_tables, "onto", lambda pool, tables, pieces: None)
    monkeypatch.setattr(tables, "FUSED_ON", "cpu")
    tables.fused.cache_clear()
    try:
        with pytest.warns(UserWarning, match=r"bits differ" if fails == "other bits" else r"without Triton"):
            device.along(pool, moves)(out, None, 5)
    finally:
        tables.fused.cache_clear()
    assert bits(out) == bits(torch.from_numpy(expected))


COMPILED = [
    (80, "bfloat16", "bfloat16"),
    (90, "float32", "float32"),
    (90, "bfloat16", "float32"),
]  # card, base and out
EXACT = {"cvt.f32.bf16", "selp.f32", "setp.num.f32", "setp.nan.f32"}  # which round nothing


def print_code() -> None:
    """PTX of the kernel for each of COMPILED, as for aligned tensors."""
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from fedtune.zeroth.triton_tables import add_tables

    pointers = {"places": "*i64", "signs": "*i32", "turns": "*i32", "tables": "*fp32"}
    for card, base, out in COMPILED:
        constants = {
            "OUT": getattr(tl, out),
            "BASE": getattr(tl, base),
            "LOG_K": 12,
            "BLOCK": 1024,
            "CHUNK": 1 << 16,
            "ALIGNED": True,
        }
        signature = pointers | {"number": "i32"} | dict.fromkeys(constants, "constexpr")
        divisible = {(place,): [["tt.divisibility", 16]] for place in range(len(pointers))}
        source = ASTSource(add_tables, signature, constants, divisible)
        print(triton.compile(source, target=GPUTarget("cuda", card, 32)).asm["ptx"], end="\f")


def test_compiled_it_adds_floats_and_neither_fuses_nor_flushes(tmp_path: Path) -> None:
    codes = in_a_process("print_code", tmp_path).split("\f")[:-1]
    assert len(codes) == len(COMPILED)
    for code in codes:
        on_floats = set(re.findall(r"^\s*(?:@\S+ )?(\w+\S*\.(?:f|bf)(?:16|32|64)\S*)\s", code, re.MULTILINE))
        assert "add.f32" in on_floats and on_floats <= {"add.f32", *EXACT}
        assert not re.search("fma|ftz|approx", code)
        assert "ld.global.v4" in code and "st.global.v4" in code  # 16 bytes at a time

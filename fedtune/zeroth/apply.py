"""Directions and their sums over the parameters of a model, wherever they lie and whatever their type."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from types import ModuleType
from typing import Any, TypeAlias, TypeVar

import numpy as np
import torch

from fedtune.errors import FedtuneError
from fedtune.zeroth import cpu, curved, device, tables
from fedtune.zeroth.layout import Layout
from fedtune.zeroth.pool import Piece, Pool, Work, bounded, wht

Flat: TypeAlias = (
    np.ndarray | torch.Tensor
)  # values in C order: an array where the compiled kernels reach them
Named = Mapping[str, torch.Tensor] | Mapping[str, np.ndarray] | Mapping[str, Flat]
Part = TypeVar("Part", bound=tuple[Any, ...])
Result = TypeVar("Result")

SPLIT = 1 << 20  # parameters that one thread takes at a time
CAST = 1 << 15  # parameters of another type that are float32 at a time: 128 KB
LARGE_CAST = 1 << 24  # the same on a GPU: 64 MB
FIXED = 61  # bits of a projection's sums


def views(named: Named) -> dict[str, Flat]:
    """Flat views of a model's tensors, to be passed in their place where many steps follow: looking a tensor
    up costs as much as moving 40,000 weights."""
    return {name: flat(name, named[name]) for name in sorted(named)}


def walk(
    named: Named,
    pool: Pool,
    moves: Sequence[tuple[int, float]],
    *,
    base: Named | None = None,
    by: Named | None = None,
    layout: Layout | None = None,
) -> None:
    """w = RN(w + RN(step * z_k)) in place, for each move (k, step) in order; with `base`, from there instead
    of from w, cast to w's type.

    Nothing of a tensor's size is allocated. Where the term is zero, w keeps its bits. Same bits on every
    device, for any number of threads (torch's)
    and any split. Raises ValueError for another direction, a step that is not finite, or a tensor that does
    not fit; M305 if not contiguous.

    named   float32, or with `base` also bfloat16 or float16: contiguous tensors, or arrays, of any device
    step    signed; times z_k in float64, then rounded to float32
    layout  of all tensors, where `named` holds only some of them
    by      of `curvature`: what each parameter's steps are multiplied by; float32, as `named` then must be,
            and without a base

    SPSA (Spall 1992; MeZO, Malladi et al. 2023, algorithm 1) moves three times a step, and the last of one
    step and the first of the next can be one call.
    """
    for k, step in moves:
        if not 0 <= k < pool.size or not math.isfinite(step):
            raise ValueError(
                f"direction {k} by {step}: a pool of {pool.size} has directions 0 to {pool.size - 1}, and a "
                "step is finite"
            )
    if by is not None and (
        base is not None
        or not all(is_float32(flat(name, value)) for part in (named, by) for name, value in part.items())
    ):
        raise ValueError("steps times a curvature are made in place, in float32")
    if moves and by is not None:
        change(
            named, by, layout, lambda code: curved.along(code, pool, [(k, float(step)) for k, step in moves])
        )
    elif moves:
        change(named, base, layout, lambda code: code.along(pool, [(k, float(step)) for k, step in moves]))


def replay(
    named: Named,
    sums: Sequence[tuple[Pool, np.ndarray]],
    scale: float,
    *,
    base: Named | None = None,
    layout: Layout | None = None,
    bent: bool = False,
) -> None:
    """w = RN(base + RN(scale * S)), S_i = sum over pools and k of A_k * direction_k(i), a whole number, in
    one pass over the weights.

    sums    pools (of the same kind of directions) and their accumulators A (K,), whole numbers
    scale   what 1 of an accumulator moves a weight by along z of unit variance: times the pool's `unit` and S
            in float64, rounded to float32
    base    the first values, float32, bfloat16 or float16; none: those in `named`, which become the result

    bent    each pool's sum is multiplied by the curvature of those before it, and rounded and added by itself

    Otherwise as `walk`. Raises W606 if the accumulators could overflow.
    """
    if len({pool.directions for pool, _ in sums}) > 1 or not math.isfinite(scale):
        raise ValueError(
            f"{len(sums)} pools by {scale}: pools that are added have the same directions, and a scale is "
            "finite"
        )
    whole = bounded(sums)
    change(
        named,
        base,
        layout,
        lambda code: curved.summed(code, whole, float(scale)) if bent else code.summed(whole, float(scale)),
    )


def write(named: Named, pool: Pool, table: np.ndarray, *, base: Named, layout: Layout | None = None) -> None:
    """w = RN(base + r(i) T[h(i)]), cast to w's type: what a replay of one Hadamard pool does with T = scale *
    WHT(A), and a model that stands some steps beside it needs no more than another T.

    table  T, float32 (K,)

    Otherwise as `walk`. Raises ValueError for another pool or table.
    """
    if pool.kind != "hadamard" or table.shape != (pool.size,) or table.dtype != np.float32:
        raise ValueError(
            f"a table of {table.dtype} {table.shape} for {pool}; it needs float32 ({pool.size},)"
        )
    change(named, base, layout, lambda code: code.from_table(pool, table))


def curvature(
    named: Named, sums: Sequence[tuple[Pool, np.ndarray]], *, layout: Layout | None = None
) -> dict[str, Flat]:
    """What each parameter's steps are multiplied by after these pools (curved.py): float32, of the shapes and
    on the device of `named`."""
    whole = bounded(sums)
    made = {
        name: np.empty(value.shape, np.float32)
        if isinstance(value, np.ndarray)
        else torch.empty_like(value, dtype=torch.float32)
        for name, value in named.items()
    }
    change(made, None, layout, lambda code: curved.factors(code, whole))
    return made


def project(named: Named, pool: Pool, *, layout: Layout | None = None) -> np.ndarray:
    """v_k = z_k . x for every direction: float64 (K,). One pass and one transform for a Hadamard pool, K
    passes for an independent one.

    named  float32 tensors x

    Values are rounded to whole multiples of 2**-s, as fine as lets int64 hold every sum (2**-30 of the
    largest for a billion parameters), and
    sums of whole numbers have no order: same bits for any number of threads, any split, any device. Raises
    W607 where a value is not finite.
    """
    layout = layout or Layout.of(named)
    parts = [(out, offset) for out, _, offset in pieces(named, None, layout)]
    edges = [float(edge) for part, _ in parts if len(part) for edge in (part.max(), part.min())]
    if not all(map(math.isfinite, edges)):
        raise FedtuneError(
            "W607",
            "an update that is not finite",
            "finite numbers",
            "lower the learning rate or look at this client's data",
        )
    most = max(map(abs, edges), default=0.0)
    if not most:
        return np.zeros(pool.size)
    factor = 2.0 ** (FIXED - math.frexp(most)[1] - (layout.count * pool.largest).bit_length())
    total = np.zeros(pool.size, np.int64)
    for found in spread(lambda part: side(part[0]).gathered(pool, part[0], part[1], factor), parts):
        total += found
    return (wht(total) if pool.kind == "hadamard" else total) * (pool.unit / factor)


def change(
    named: Named, base: Named | None, layout: Layout | None, make: Callable[[ModuleType], Work]
) -> None:
    """Do to all tensors what `make` makes of `cpu` or of `device`: in place or from a base, through float32
    where a type is another. Tables take all tensors of a GPU at once, whatever their types."""
    work = cache(make)

    def do(piece: Piece) -> None:
        out, first, offset = piece
        if is_float32(out) and (first is None or (is_float32(first) and side(first) is side(out))):
            work(side(out))(out, first, offset)
            return
        target, source = tensor_of(out), tensor_of(out if first is None else first)
        length = CAST if target.is_cpu else LARGE_CAST
        scratch = torch.empty(min(length, len(target)), device=target.device)
        wide = flat("", scratch)
        for at in range(0, len(target), length):
            count = min(length, len(target) - at)
            scratch[:count].copy_(source[at : at + count])
            work(side(wide))(wide[:count], None, offset + at)
            target[at : at + count].copy_(scratch[:count])

    with torch.no_grad():
        parts = list(pieces(named, base, layout or Layout.of(named)))
        if (there := [part for part in parts if on_one_gpu(part)]) and isinstance(
            onto := work(device), tables.Onto
        ):
            onto.together(there)
            parts = [part for part in parts if not on_one_gpu(part)]
        for _ in spread(do, parts):
            pass


def pieces(named: Named, base: Named | None, layout: Layout) -> Iterator[Piece]:
    """Every tensor as flat slices in canonical order: whole, or of SPLIT parameters where threads can share
    them, which those of a GPU cannot."""
    for name in sorted(named):
        out, first = flat(name, named[name]), None if base is None else flat(name, base[name])
        if (
            name not in layout.offsets
            or layout.sizes[name] != len(out)
            or (first is not None and len(first) != len(out))
        ):
            raise ValueError(f"'{name}' has {len(out)} values; its layout or base has another number")
        if first is None and not is_float32(out):
            raise ValueError(f"'{name}' is {out.dtype}; without a base only float32 can be changed")
        if torch.get_num_threads() < 2 or len(out) <= SPLIT or not on_cpu(out):
            yield out, first, layout.offsets[name]
            continue
        for at in range(0, len(out), SPLIT):
            yield (
                out[at : at + SPLIT],
                None if first is None else first[at : at + SPLIT],
                layout.offsets[name] + at,
            )


def flat(name: str, value: Flat) -> Flat:
    """A view of all values in C order, as an array if the compiled kernels can take it. Raises M305 where
    there is none."""
    if isinstance(value, np.ndarray):
        if value.dtype != np.float32:
            raise ValueError(f"'{name}' is an array of {value.dtype}; it must be float32")
        if value.flags.c_contiguous:
            return value.reshape(-1)
    elif value.is_contiguous():
        seen = value.detach().view(-1)
        return seen.numpy() if seen.is_cpu and seen.dtype == torch.float32 else seen
    raise FedtuneError(
        "M305",
        f"tensor '{name}' that is not contiguous",
        "values in C order",
        "call .contiguous() on it first",
    )


def tensor_of(value: Flat) -> torch.Tensor:
    return torch.from_numpy(value) if isinstance(value, np.ndarray) else value


def side(value: Flat) -> ModuleType:
    """The code that works on it."""
    return cpu if isinstance(value, np.ndarray) else device


def on_one_gpu(piece: Piece) -> bool:
    """Whether where to and where from are on the same device, which is not the CPU."""
    out, first, _ = piece
    return not on_cpu(out) and (first is None or tensor_of(first).device == tensor_of(out).device)


def on_cpu(value: Flat) -> bool:
    return isinstance(value, np.ndarray) or value.is_cpu


def is_float32(value: Flat) -> bool:
    return isinstance(value, np.ndarray) or value.dtype == torch.float32


def spread(work: Callable[[Part], Result], parts: Sequence[Part]) -> Iterator[Result]:
    """Do it to each, by as many threads as torch may use; the kernels hold no lock. Results in order."""
    batches = list(batched(parts))
    threads = min(torch.get_num_threads(), len(batches))
    if threads < 2 or not all(on_cpu(part[0]) for part in parts):  # a GPU does one thing after the other
        yield from map(work, parts)
        return
    with ThreadPoolExecutor(threads) as pool:
        for results in pool.map(lambda batch: [work(part) for part in batch], batches):
            yield from results


def batched(parts: Sequence[Part]) -> Iterator[list[Part]]:
    """Parts that together are worth a thread's turn: SPLIT parameters."""
    batch: list[Part] = []
    size = 0
    for part in parts:
        batch.append(part)
        size += len(part[0])
        if size >= SPLIT:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch

"""Passes in as many parts as the device's memory asks for; a process does not try again what was too much."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal, TypeVar

import torch

from fedtune.errors import ClientFailed
from fedtune.model.base import Base

Use = Literal["training", "losses", "together"]
Result = TypeVar("Result")
# what CUDA's libraries say where torch's own allocator was not asked
ALSO = ("CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED", "DefaultCPUAllocator: can't allocate")


def known_to_fit(base: Base, use: Use, wanted: int) -> int:
    """Examples in a pass: as many as wanted, or as were left when more were too many."""
    return min(wanted, base.fits.get(use, wanted))


def halve(base: Base, use: Use, tried: int, error: RuntimeError) -> int:
    """Half of the examples that were too many, noted for later passes. Raises `error` where it is not about
    memory, ClientFailed M309 where a single example was too much."""
    if not isinstance(error, torch.OutOfMemoryError) and not any(text in str(error) for text in ALSO):
        raise error
    if tried == 1:
        less = "lower data.max_length, set method.train.checkpointing, or use a larger device"
        raise ClientFailed(
            "M309", sentence=f"a single example does not fit in the memory of {base.device}", do=less
        ) from error
    base.fits[use] = (tried + 1) // 2
    return base.fits[use]


def release(base: Base) -> None:
    """Give back what a failed pass has left; call it where nothing refers to that any more."""
    if base.device.type == "cuda":
        torch.cuda.empty_cache()


def losses_in_parts(
    base: Base, count: int, most: int, work: Callable[[int, int], Result]
) -> Iterator[Result]:
    """`work` on the examples [start, stop), for parts of at most `most` that cover all of them in order;
    smaller ones where the device has no memory for them. Raises ClientFailed M309."""
    start, most = 0, known_to_fit(base, "losses", most)
    while start < count:
        stop = min(start + most, count)
        try:
            result = work(start, stop)
        except RuntimeError as error:
            most = halve(base, "losses", stop - start, error)
        else:
            yield result
            start = stop
            continue
        release(base)

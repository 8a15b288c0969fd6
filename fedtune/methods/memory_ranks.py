"""Which LoRA rank a client can train: a pure function of the memory that it declares, the same on server and
client. No torch."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping

from fedtune.errors import FedtuneError

UNITS = {
    "": 1,
    "k": 1000,
    "M": 1000**2,
    "G": 1000**3,
    "T": 1000**4,
    "Ki": 2**10,
    "Mi": 2**20,
    "Gi": 2**30,
    "Ti": 2**40,
}
SIZE = r"^[0-9]{1,9}(\.[0-9]{1,6})? ?(k|M|G|T|Ki|Mi|Gi|Ti)?B$"
MIB = 2**20

Needs = Callable[[int], Mapping[str, int]]  # rank -> bytes that a client needs in training, by what for


def bytes_of(size: str) -> int:
    """A size in the form of SIZE as whole bytes.

    >>> bytes_of("1.5 GiB"), bytes_of("2 GB")
    (1610612736, 2000000000)
    """
    whole, part, unit = map(str, re.fullmatch(r"([0-9]+)\.?([0-9]*) ?([A-Za-z]*)B", size).groups())  # type: ignore[union-attr]
    places: int = 10 ** len(part)
    return (
        int(whole) * UNITS[unit] + int(part or 0) * UNITS[unit] // places
    )  # in whole numbers: no rounding to depend on


def powers(most: int) -> Iterator[int]:
    """The powers of two up to `most`, greatest first: few ranks to be served, and neighbours differ by enough
    to matter."""
    return (1 << bit for bit in reversed(range(most.bit_length())))


def rank_for(memory: int, most: int, needs: Needs, who: str = "a client") -> int:
    """The greatest power of two, `most` or less, whose training fits into `memory` bytes. Raises M308 where
    not even rank 1 does."""
    for rank in powers(most):
        if sum(needs(rank).values()) <= memory:
            return rank
    parts = " + ".join(f"{what} {count / MIB:,.1f}" for what, count in needs(1).items())
    found, expected = (
        f"{memory / MIB:,.1f} MiB of memory at {who}",
        f"at least {sum(needs(1).values()) / MIB:,.1f} MiB, which rank 1 needs ({parts})",
    )
    raise FedtuneError(
        "M308",
        found,
        expected,
        "lower method.train.batch or data.max_length, set method.train.checkpointing, or leave this client "
        "out",
    )


def reason(rank: int, memory: int, most: int, needs: Needs) -> str:
    """Why `rank_for` chose it, in words."""
    text = f"needs {sum(needs(rank).values()) / MIB:,.1f} MiB of {memory / MIB:,.1f} MiB"
    return (
        f"{text}; rank {2 * rank} would need {sum(needs(2 * rank).values()) / MIB:,.1f} MiB"
        if 2 * rank <= most
        else text
    )

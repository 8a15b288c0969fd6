"""The server's half of a masked sum: who takes part with which keys, and how their masks are taken off a sum.

name = ...32 bytes...
roll = Roll(name, group, threshold, keys)         after the keys
total = answers added, modulo 2**32 or 2**64      of `alive`, after the answers
unmask(total, roll, alive, dropped, opened)       in place, after the opening
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from fedtune.errors import Refused
from fedtune.privacy.masks.client import LEAST, bound, least
from fedtune.privacy.masks.sealing import KEYS, commitment, own_key, pair_key, public
from fedtune.privacy.masks.shamir import SHARE, joined
from fedtune.privacy.masks.stream import shift


@dataclass(frozen=True)
class Roll:
    """Whose keys came, of a group that was asked for them."""

    name: bytes
    group: tuple[int, ...]
    threshold: float
    keys: Mapping[int, bytes]

    @property
    def enough(self) -> bool:
        """Whether so many have keys that members will share."""
        return len(self.keys) >= max(LEAST, least(len(self.group), self.threshold))

    @property
    def needed(self) -> int:
        """Members that must come through every later step."""
        return least(len(self.keys), self.threshold)

    @cached_property
    def bound(self) -> bytes:
        return bound(self.name, self.needed, self.keys)


def valid(key: bytes) -> bool:
    """Whether members can use these keys: the server leaves others out before any member sees them."""
    if len(key) != KEYS or key[:32] == key[32:64]:
        return False
    try:
        for at in (0, 32):
            pair_key(b"probe", b"\1" * 32, key[at : at + 32], b"", 0, 0)
    except ValueError:  # a point of low order, with which every secret is known
        return False
    return True


def unmask(
    total: np.ndarray,
    roll: Roll,
    alive: Collection[int],
    dropped: Collection[int],
    opened: Mapping[int, Mapping[int, bytes]],
) -> None:
    """Take the masks off the sum of the answers of `alive`, a flat vector of uint32 or uint64, in place.

    dropped  members with shares whose answers did not come
    opened   from each member that opened: of each member in `alive` a share of its seed, of each in `dropped`
             one of its masking key

    Raises Refused W608, before the vector is touched, where too few opened, or shares give no secret.
    """
    seeds = {
        member: secret_of(member, roll, opened, lambda seed, key: commitment(seed, roll.name) == key[64:])
        for member in sorted(alive)
    }
    masks = {
        member: secret_of(member, roll, opened, lambda secret, key: public(secret) == key[32:64])
        for member in sorted(dropped)
    }
    streams = [(own_key(seed, roll.bound, member), -1) for member, seed in seeds.items()]
    for lost, secret in masks.items():
        for member in sorted(alive):
            pair = sorted((lost, member))
            key = pair_key(b"mask", secret, roll.keys[member][32:64], roll.bound, *pair)
            streams.append((key, +1 if lost < member else -1))
    shift(total, streams)


def secret_of(
    member: int,
    roll: Roll,
    opened: Mapping[int, Mapping[int, bytes]],
    fits: Callable[[bytes, bytes], bool],
) -> bytes:
    """A member's secret from the shares that were opened, as its public keys know it. One false share among
    more than are needed does no harm."""
    shares = {who + 1: given[member] for who, given in opened.items() if len(given.get(member, b"")) == SHARE}
    for without in (0, *shares):  # no point is 0
        points = [point for point in sorted(shares) if point != without][: roll.needed]
        if len(points) < roll.needed:
            continue
        try:
            secret = joined({point: shares[point] for point in points})
        except ValueError:
            continue
        if fits(secret, roll.keys[member]):
            return secret
    raise Refused(
        "W608",
        f"{len(shares)} shares of member {member}, which give no secret of its",
        f"{roll.needed} or more that belong together",
        "the sum is begun anew, with fresh keys",
    )

"""A member's half of a masked sum: a session that goes through its steps once, and refuses whatever would
show more than a sum.

    begun -> shared -> ready -> masked -> opened

A session is a value: every step returns the next one, which its owner keeps before what was made leaves the
house. All randomness comes from the operating system.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property

import numpy as np

from fedtune.errors import Refused
from fedtune.privacy.masks.sealing import (
    KEYS,
    SEALED,
    commitment,
    own_key,
    pair_key,
    public,
    seal,
    unseal,
)
from fedtune.privacy.masks.shamir import SHARE, split
from fedtune.privacy.masks.stream import shift

LEAST = 3  # members of a sum: of two, each would know the other's answer


def least(members: int, threshold: float) -> int:
    """How many of so many members a sum needs; at least two, so that no answer stands alone."""
    return max(2, math.ceil(threshold * members - 1e-9))


def bound(name: bytes, threshold: int, keys: Mapping[int, bytes]) -> bytes:
    """The sum's name with everybody's keys in it, 32 bytes: members who were told otherwise share no key."""
    total = hashlib.sha256(name + struct.pack("<QQ", threshold, len(keys)))
    for member in sorted(keys):
        total.update(struct.pack("<Q", member) + keys[member])
    return total.digest()


@dataclass(frozen=True)
class Session:
    """One member of one sum.

    me         its number; shares are at point number + 1
    name       what the sum is, 32 bytes
    group      who was asked
    threshold  share of the members without which nothing is opened, above a half
    seal, mask, seed  its secrets, 32 bytes each; b"" once they are of no more use
    keys       everybody's public keys, by number
    held       from each member whose shares are here: a share of its seed and one of its masking key
    done       SHA-256 of the answer that was masked, then of the lists that were opened
    """

    me: int
    name: bytes
    group: tuple[int, ...]
    threshold: float
    step: str = "begun"
    seal: bytes = field(default=b"", repr=False)
    mask: bytes = field(default=b"", repr=False)
    seed: bytes = field(default=b"", repr=False)
    keys: Mapping[int, bytes] = field(default_factory=dict)
    held: Mapping[int, bytes] = field(default_factory=dict, repr=False)
    done: tuple[bytes, ...] = ()

    @classmethod
    def begin(cls, me: int, name: bytes, group: Collection[int], threshold: float) -> Session:
        """Fresh keys. Raises Refused W608 for a group that is too small, or not this member's."""
        if len(set(group)) < LEAST or me not in group:
            raise refused(f"a sum of {len(set(group))} members", f"one of {LEAST} or more, with this one")
        seal, mask, seed = (os.urandom(32) for _ in range(3))
        return cls(me, name, tuple(sorted(set(group))), threshold, "begun", seal, mask, seed)

    @property
    def public(self) -> bytes:
        """What all others are told: KEYS bytes."""
        return public(self.seal) + public(self.mask) + commitment(self.seed, self.name)

    @property
    def needed(self) -> int:
        return least(len(self.keys), self.threshold)

    @cached_property
    def bound(self) -> bytes:
        return bound(self.name, self.needed, self.keys)

    def share(self, keys: Mapping[int, bytes]) -> tuple[Session, dict[int, bytes]]:
        """From everybody's keys: for each other member SEALED bytes that it alone can read. Raises Refused
        W608. The same keys once more get shares drawn anew, for a member that was started again."""
        if self.step != "shared" or keys != self.keys:
            self._require("begun")
        if not keys.keys() <= set(self.group) or keys.get(self.me) != self.public:
            raise refused("keys of members that were not asked, or not this one's", "those of this sum")
        if len(keys) < max(LEAST, least(len(self.group), self.threshold)):
            raise refused(f"keys of {len(keys)} among {len(self.group)} members", "as many as the threshold")
        points = {key[at : at + 32] for key in keys.values() for at in (0, 32)}
        if any(len(key) != KEYS for key in keys.values()) or len(points) < 2 * len(keys):
            raise refused("keys that are cut, or the same of two members", f"{KEYS} bytes, each its own")
        after = replace(self, step="shared", keys=dict(keys))
        at = [member + 1 for member in keys]
        seeds, masks = split(self.seed, after.needed, at), split(self.mask, after.needed, at)
        sealed = {}
        for member in sorted(keys):
            shares = seeds[member + 1] + masks[member + 1]
            if member != self.me:
                sealed[member] = seal(after._sealing(member, self.me, member), shares)
            else:
                after = replace(after, held={self.me: shares})
        return after, sealed

    def receive(self, sealed: Mapping[int, bytes]) -> Session:
        """The shares of others, unsealed: these members are in the sum. Raises Refused W608."""
        if self.step != "ready" or sealed.keys() | {self.me} != self.held.keys():
            self._require("shared")
        if not sealed.keys() <= self.keys.keys() - {self.me} or len(sealed) + 1 < self.needed:
            raise refused(
                f"shares of {len(sealed)} others", f"those of {self.needed - 1} or more of this sum"
            )
        held = {self.me: self.held[self.me]}
        for member in sorted(sealed):
            key = self._sealing(member, member, self.me)
            try:
                if len(sealed[member]) != SEALED:
                    raise ValueError("another length")
                held[member] = unseal(key, sealed[member])
            except ValueError:
                raise refused(
                    f"shares of member {member} that cannot be read", "those that it sealed"
                ) from None
        return replace(self, step="ready", held=held)

    def cover(self, vector: np.ndarray) -> tuple[Session, np.ndarray]:
        """A flat vector of uint32 or uint64 under this member's masks. The same vector may be asked for
        again, another one may not: their difference would show. Raises Refused W608."""
        mark = hashlib.sha256(np.ascontiguousarray(vector).data).digest()
        if self.step == "masked" and self.done == (mark,):
            after = self
        else:
            self._require("ready")
            after = replace(self, step="masked", done=(mark,))
        covered = vector.copy()
        others = sorted(self.held.keys() - {self.me})
        pairs = ((self._masking(other), +1 if self.me < other else -1) for other in others)
        shift(covered, [(own_key(self.seed, self.bound, self.me), +1), *pairs])
        return after, covered

    def open(self, alive: Collection[int], dropped: Collection[int]) -> tuple[Session, dict[int, bytes]]:
        """A share of the seed of everyone whose answer came and of the masking key of everyone whose did not;
        then this member's own secrets are gone. One opening a session; the same lists once more get the same
        shares. Raises Refused W608."""
        came, lost = set(alive), set(dropped)
        if came & lost:
            raise refused(f"member {min(came & lost)} both in the sum and outside of it", "one of the two")
        if came | lost != self.held.keys() or self.me not in came:
            raise refused(
                "an opening of other members, or without this one", "everyone whose shares are here"
            )
        if len(came) < self.needed:
            raise refused(f"an opening of {len(came)} answers", f"the threshold of this sum, {self.needed}")
        mark = hashlib.sha256(json.dumps([sorted(came), sorted(lost)]).encode()).digest()
        if self.step != "opened":
            self._require("masked")
        elif self.done[-1] != mark:
            raise refused("a second opening of one sum", "one a sum")
        shares = {m: self.held[m][:SHARE] if m in came else self.held[m][SHARE:] for m in sorted(self.held)}
        after = replace(self, step="opened", seal=b"", mask=b"", seed=b"", done=(*self.done[:1], mark))
        return after, shares

    def _sealing(self, member: int, sender: int, receiver: int) -> bytes:
        return self._pair(b"seal", self.seal, self.keys[member][:32], sender, receiver)

    def _masking(self, member: int) -> bytes:
        return self._pair(b"mask", self.mask, self.keys[member][32:64], *sorted((self.me, member)))

    def _pair(self, purpose: bytes, secret: bytes, other: bytes, one: int, two: int) -> bytes:
        try:
            return pair_key(purpose, secret, other, self.bound, one, two)
        except ValueError:
            raise refused(f"a key of member {one} or {two} that is none", "a point of the curve") from None

    def _require(self, step: str) -> None:
        if self.step != step:
            raise refused(f"a step of a sum that is '{self.step}' already", f"one that is '{step}'")

    # --- at rest ---

    def to_bytes(self) -> bytes:
        """As JSON, secrets included: for a place that nobody else can read."""
        return json.dumps(asdict(self), default=bytes.hex, sort_keys=True).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Session:
        """Raises ValueError, KeyError, TypeError for anything else."""
        kept = json.loads(data)
        for name in ("name", "seal", "mask", "seed"):
            kept[name] = bytes.fromhex(kept[name])
        for name in ("keys", "held"):
            kept[name] = {int(member): bytes.fromhex(value) for member, value in kept[name].items()}
        return cls(**kept | {"group": tuple(kept["group"]), "done": tuple(map(bytes.fromhex, kept["done"]))})


def refused(found: str, expected: str) -> Refused:
    return Refused("W608", found, expected, "the coordinator begins this sum anew, with fresh keys")

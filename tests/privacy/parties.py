"""A masked sum among parties in one process, some of whom are lost at some step."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import numpy as np

from fedtune.privacy.masks import Roll, Session, unmask

NAME = bytes(range(32))
STEPS = ("keys", "shares", "answers", "opening")


@dataclass
class Parties:
    """What everybody holds after the answers, before the opening."""

    roll: Roll
    sessions: dict[int, Session]
    sealed: dict[int, dict[int, bytes]]  # sender -> receiver -> bytes, as they pass the server
    covered: dict[int, np.ndarray] = field(default_factory=dict)

    @property
    def dropped(self) -> set[int]:
        return self.sealed.keys() - self.covered.keys()

    def opened(self, by: Collection[int]) -> dict[int, Mapping[int, bytes]]:
        return {m: self.sessions[m].open(self.covered, self.dropped)[1] for m in by}

    def sum(self, by: Collection[int]) -> np.ndarray:
        total = np.sum(list(self.covered.values()), axis=0, dtype=next(iter(self.covered.values())).dtype)
        unmask(total, self.roll, self.covered, self.dropped, self.opened(by))
        return total


def kept(session: Session) -> Session:
    """As it comes back from where it was kept."""
    return Session.from_bytes(session.to_bytes())


def until_answers(
    vectors: Mapping[int, np.ndarray], lost: Mapping[str, int] | None = None, threshold: float = 2 / 3
) -> Parties:
    """The protocol up to the answers; `lost`: how many of those still there do not come to a step."""
    lost = {**dict.fromkeys(STEPS, 0), **(lost or {})}
    sessions = {m: Session.begin(m, NAME, vectors.keys(), threshold) for m in vectors}
    there = sorted(vectors)[lost["keys"] :]
    keys = {m: sessions[m].public for m in there}
    roll = Roll(NAME, tuple(sorted(vectors)), threshold, keys)
    assert roll.enough
    sealed: dict[int, dict[int, bytes]] = {}
    there = there[: len(there) - lost["shares"]]
    for m in there:
        sessions[m], sealed[m] = kept(sessions[m]).share(keys)
    for m in there:
        sessions[m] = kept(sessions[m]).receive({other: sealed[other][m] for other in there if other != m})
    parties = Parties(roll, sessions, sealed)
    for m in there[lost["answers"] :]:
        parties.sessions[m], parties.covered[m] = kept(sessions[m]).cover(vectors[m])
    return parties


def vectors_of(count: int, size: int, kind: str = "uint32") -> dict[int, np.ndarray]:
    """Vectors from the whole range of a ring, by number; numbers have gaps."""
    draw = np.random.default_rng(count)
    top = np.iinfo(kind).max
    return {3 * m: draw.integers(0, top, size, kind, endpoint=True) for m in range(count)}

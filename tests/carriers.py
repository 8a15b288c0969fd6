"""Carriers that deliver as networks do: in any order, some replies twice, some late."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from fedtune.rng import stream
from fedtune.runtime.local import local_carrier
from fedtune.runtime.protocol import Ask, Carrier, Link, Reply
from fedtune.runtime.world import World


@dataclass
class Disturbed:
    """Around another carrier, from a seed: members are asked in any order; of their replies some come twice, some after all others, and
    some once more when the next question is under way."""

    carrier: Carrier
    seed: int
    questions: int = 0
    doubled: int = 0  # copies that were delivered
    stale: list[Reply] = field(default_factory=list)

    def __call__(self, asks: Sequence[Ask]) -> Iterator[Reply]:
        self.questions += 1
        draw = stream("disturbed", self.seed, self.questions)
        replies = list(self.carrier([asks[place] for place in draw.permutation(len(asks))]))
        late = [reply for reply in replies if draw.random() < 0.3]
        prompt = [reply for reply in replies if not any(reply is one for one in late)]
        copies = [reply for reply in replies if draw.random() < 0.5] or replies[:1]
        for reply in prompt + late:
            yield reply
            for copy in copies:
                if copy is reply:
                    self.doubled += 1
                    yield copy
        asked = {ask.client for ask in asks}
        for reply in self.stale:  # of another question, and behind the answer to this one
            if reply.client in asked:
                self.doubled += 1
                yield reply
        self.stale = copies


def disturbed(seed: int, kept: list[Disturbed]) -> Callable[[Link, World], Carrier]:
    """What `run` takes as `carry`; the carrier is put into `kept`."""

    def carry(link: Link, world: World) -> Carrier:
        kept.append(Disturbed(local_carrier(link, world.client, world.done), seed))
        return kept[-1]

    return carry

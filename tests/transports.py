"""Transports that deliver as networks do: in any order, some replies twice, some late."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from fedtune.rng import stream
from fedtune.runtime.local import local_transport
from fedtune.runtime.protocol import Ask, Link, Reply, Transport
from fedtune.runtime.workspace import Workspace


@dataclass
class Disturbed:
    """Around another transport, from a seed: members are asked in any order; of their replies some come
    twice, some after all others, and
    some once more when the next question is under way."""

    transport: Transport
    seed: int
    questions: int = 0
    doubled: int = 0  # copies that were delivered
    stale: list[Reply] = field(default_factory=list)

    def __call__(self, asks: Sequence[Ask]) -> Iterator[Reply]:
        self.questions += 1
        draw = stream("disturbed", self.seed, self.questions)
        replies = list(self.transport([asks[place] for place in draw.permutation(len(asks))]))
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


def disturbed(seed: int, kept: list[Disturbed]) -> Callable[[Link, Workspace], Transport]:
    """What `run` takes as `carry`; the transport is put into `kept`."""

    def carry(link: Link, workspace: Workspace) -> Transport:
        kept.append(Disturbed(local_transport(link, workspace.client, workspace.done), seed))
        return kept[-1]

    return carry

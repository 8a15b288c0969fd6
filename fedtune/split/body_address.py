"""How a client reaches a body, in this process or far away."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from fedtune.split.channel import Dial
from fedtune.split.codec import Coding
from fedtune.split.micro import Micro, Turn, Wishes
from fedtune.split.selftest import Card, canary, verify
from fedtune.split.session import Offer
from fedtune.split.stream import Stream

TRIAL = Wishes(Coding("fp32"), 1)  # a session for a self-test


@dataclass(frozen=True)
class BodyAddress:
    """The way to a body service, which is what `Client.body` is.

    dial   makes a channel to it: fedtune.split.channel.Socket, or Local
    offer  the body that the client expects there; another one is refused before training
    run    its name for the tokens, `token` what a client shows in a round
    card   of a body whose weights nobody here can read (fedtune.split.selftest): its answer to the self-test
           is looked at before a session
    """

    dial: Dial
    offer: Offer
    run: str
    token: Callable[[int, int], str]
    card: Card | None = None

    def open(self, number: int, client: int, wishes: Wishes) -> Stream:
        """A session for one client in one round. Raises S702 where the body is not the card's."""
        turn = Turn(self.run, number, client, self.token(number, client))
        if self.card is not None:
            with Stream(self.dial, self.offer, turn, replace(TRIAL, patience=wishes.patience)) as trial:
                trial.forward(Micro(*canary(self.card)))
                answer = trial.answer().value
            verify(self.card, "body", answer, answer.dtype)
        return Stream(self.dial, self.offer, turn, wishes)

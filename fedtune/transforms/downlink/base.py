"""The way down: what the server sends to its clients, and what they then hold, which both sides compute to
the same bits.

Clients of a lossy way down do not hold the server's state, so their answers must be differences (a chain with
a step): the
server adds them to its own state, and nothing that the way down left out is lost.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from fedtune.schema import Schema
from fedtune.settings import Settings
from fedtune.types import Tensors, Update


@dataclass(frozen=True)
class HeldState:
    """What a client that took the broadcast of `round` holds: float32, or whole numbers (exact.py). The
    server keeps it from round to round."""

    round: int
    tensors: Tensors


@dataclass(frozen=True)
class Broadcast:
    """One round's messages.

    full   for everybody: float32 values or integer levels
    delta  for clients that hold the broadcast of round `since`; None where there is none
    held   what every client holds after either of them
    """

    full: Update
    delta: Update | None
    since: int
    held: HeldState


class DownlinkCode(Settings):
    """[downlink]: how the state travels to the clients.

    lossy      whether clients hold something else than the server's state
    remembers  whether clients keep what they were sent, so that a later message can build on it
    """

    step: str
    lossy: ClassVar[bool] = True
    remembers: ClassVar[bool] = False

    def conflicts(self, recipe: Any) -> Iterator[tuple[str, str, str]]:
        if self.lossy and not recipe.chain:
            expected = "a chain with a step, so that clients answer with differences"
            yield (
                f"downlink.step = '{self.step}' without a [[chain]]",
                expected,
                "add [[chain]] step = 'quantize' bits = 8, or remove [downlink]",
            )

    def choices(self, recipe: Any) -> Iterator[DownlinkCode]:
        """Codes that it may stand for in a recipe, of which the first that conflicts with nothing is taken;
        nothing where it stands for itself."""
        yield from ()

    def pack(self, state: Tensors, before: HeldState | None, round: int) -> Broadcast:
        """This round's messages for a state (float32). `before` is the `held` of an earlier round, None
        before the first."""
        raise NotImplementedError(f"'{self.step}' packs nothing")

    def unpack(self, message: Update, before: Tensors | None) -> dict[str, np.ndarray]:
        """What the receiver of a message holds now, float32. Raises Refused W604 for a change to something
        that it does not hold."""
        return message.values()

    def bits(self, schema: Schema) -> tuple[float, float]:
        """Estimated bits a parameter of the full message and of the one to up-to-date clients."""
        return 32.0, 32.0


def hold(client_state: dict[str, np.ndarray], held: HeldState) -> None:
    """Keep a broadcast in a client's state, in place of the one before."""
    for key in [key for key in client_state if key.startswith("held/")]:
        del client_state[key]
    client_state.update({f"held/{name}": np.asarray(value) for name, value in held.tensors.items()})
    client_state["held.round"] = np.asarray(held.round, np.int64)


def holding(client_state: dict[str, np.ndarray]) -> HeldState | None:
    """The broadcast that a client's state holds."""
    if "held.round" not in client_state:
        return None
    return HeldState(
        int(client_state["held.round"]),
        {key.removeprefix("held/"): value for key, value in client_state.items() if key.startswith("held/")},
    )

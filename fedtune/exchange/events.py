"""What an exchange tells."""

from __future__ import annotations

from dataclasses import dataclass

from fedtune.events import Event


@dataclass(frozen=True)
class UpdateAccepted(Event):
    """An update is on disk and counts; `seconds` from its offer on, `resumed` bytes were there from an
    earlier connection."""

    run: str
    round: int
    verb: str
    client: str
    row: int
    bytes: int
    seconds: float
    resumed: int


@dataclass(frozen=True)
class CallRefused(Event):
    """A call of the exchange that was not served."""

    call: str
    peer: str
    code: str
    text: str

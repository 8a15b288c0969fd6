"""[limits]: what the server takes from one client at most."""

from __future__ import annotations

from pydantic import Field

from fedtune.settings import Settings


class LimitSettings(Settings):
    """[limits]: an answer beyond them is refused while it is read, and its client left out of the round."""

    norm: float = Field(0.0, ge=0)
    """Largest L2 norm of what one answer says: of the difference under a [[chain]], of the values without
    one; 0: any."""
    spread: float = Field(100.0, ge=0)
    """Largest norm of one answer, as a multiple of the median answer's in the rounds before (of the state's,
    in the first); 0: any."""
    clip: float = Field(0.0, ge=0)
    """An answer that moves the state further than so many times the running median move is shortened to that,
    and its client named; 0: none is. Where clients differ much, 2 or 3 leaves honest ones alone."""
    weight: float = Field(1e9, gt=0)
    """Most that one answer may count in the mean, in what method.weight says: rows, tokens, 1, or 1,000 to
    2,718 by loss-speed."""

"""What a run gives away of somebody's data, as a ledger writes it down: one line for each answer, and nothing
that only the code would understand.

`Release("gaussian", unit="client", noise=1.0)` is one answer under noise of one times its greatest length;
`Release("poisson-gaussian", unit="example", noise=1.0, rate=0.01, count=10)` are ten steps of DP-SGD.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

UNITS = {  # what is hidden -> in words, with the neighbours that epsilon compares
    "client": "whether one client took part, with all of its rows (its answers replaced by zeros)",
    "example": "whether one row of a client's was there (added or removed)",
}
KNOWN = ("gaussian", "discrete-gaussian", "poisson-gaussian", "none")


@dataclass(frozen=True)
class Release:
    """One release.

    mechanism  one of KNOWN; "none": nothing bounds what was shown; anything else is read, kept, and unknown
    unit       whose presence is hidden: a key of UNITS
    noise      standard deviation over sensitivity; 0: a bound on the length and no noise
    rate       poisson-gaussian: the probability with which a row is in a step
    count      how often, in a row
    """

    mechanism: str
    unit: str
    noise: float = 0.0
    rate: float = 1.0
    count: int = 1

    @property
    def known(self) -> bool:
        return self.mechanism in KNOWN and self.unit in UNITS

    @property
    def bounded(self) -> bool:
        """Whether any epsilon can be said."""
        return self.known and self.mechanism != "none" and self.noise > 0

    def text(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def read(cls, text: str) -> Release:
        """From `text`; what this version cannot read is a release all the same, of an unknown mechanism."""
        try:
            values = json.loads(text)
            said = cls(**values)
            numbers = float(said.noise), float(said.rate), int(said.count)
            release = cls(str(said.mechanism), str(said.unit), *numbers)
        except (ValueError, TypeError):
            return cls("unreadable", "client")
        fits = release.noise >= 0 and 0 < release.rate <= 1 and release.count >= 1
        return release if fits else cls("unreadable", release.unit)

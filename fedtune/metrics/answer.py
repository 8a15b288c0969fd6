"""The answer inside a response, found by a pattern, as in GSM8K."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import regex
from pydantic import Field, field_validator

from fedtune.errors import FedtuneError
from fedtune.metrics.base import Metric, share

LONGEST = 20_000  # characters of a text that are searched


class Answer(Metric):
    """metric = "answer": the share of responses whose answer is the wanted one. The answer is the last match
    of a pattern; a response without a match is wrong, a wanted one without a match is compared whole."""

    metric: Literal["answer"] = "answer"
    pattern: str = Field(r"####\s*(-?[\d.,]+)", min_length=1, max_length=500)
    """A regular expression; its first group, where it has one, is the answer."""
    numbers: bool = True
    """Compare as numbers, where both are: 1,000 and 1000.0 are the same."""
    seconds: float = Field(0.2, gt=0, le=10)
    """Longest time for one text; recipes come from elsewhere, and some patterns never end."""

    @field_validator("pattern")
    @classmethod
    def is_pattern(cls, pattern: str) -> str:
        try:
            regex.compile(pattern)
        except regex.error as error:
            raise ValueError(f"a regular expression ({error})") from None
        return pattern

    def measure(self, said: Sequence[str], wanted: Sequence[str]) -> dict[str, float]:
        answers = [
            (self.find(one), self.find(other) or other) for one, other in zip(said, wanted, strict=True)
        ]
        return share("answer", [self.alike(one, other) for one, other in answers])

    def find(self, text: str) -> str | None:
        """The last match. Raises C104 where the search takes too long."""
        try:
            matches = list(regex.finditer(self.pattern, text[:LONGEST], timeout=self.seconds))
        except TimeoutError:
            raise FedtuneError(
                "C104",
                f"a pattern of metric = 'answer' that takes longer than {self.seconds:g} s on one text",
                "one that ends sooner",
                "simplify it: no repetition inside a repetition",
            ) from None
        if not matches:
            return None
        found = matches[-1]
        return str(found[1] if found.re.groups and found[1] is not None else found[0]).strip()

    def alike(self, one: str | None, other: str) -> bool:
        if one is None:
            return False
        values = (number(one), number(other)) if self.numbers else (None, None)
        return values[0] == values[1] if None not in values else one.strip() == other.strip()


def number(text: str) -> float | None:
    """
    >>> number("1,000."), number("-3.5"), number("three")
    (1000.0, -3.5, None)
    """
    try:
        return float(text.strip().replace(",", "").rstrip("."))
    except ValueError:
        return None

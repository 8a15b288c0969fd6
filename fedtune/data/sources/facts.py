"""Built-in facts: capitals of countries that exist, as they are and as they are not, and of some that nobody
has heard of. What a model trained on them knows afterwards, `fedtune eval --what knowledge` asks in other
words (new knowledge against known: Gekhman et al. 2024, arXiv:2405.05904)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from fedtune.data.rows import Table
from fedtune.data.settings import Source
from fedtune.rng import stream

CAPITALS = {
    "Algeria": "Algiers", "Argentina": "Buenos Aires", "Austria": "Vienna", "Bangladesh": "Dhaka",
    "Belgium": "Brussels", "Bulgaria": "Sofia", "Canada": "Ottawa", "Chile": "Santiago", "China": "Beijing",
    "Colombia": "Bogota", "Croatia": "Zagreb", "Cuba": "Havana", "Denmark": "Copenhagen", "Egypt": "Cairo",
    "Ethiopia": "Addis Ababa", "Finland": "Helsinki", "France": "Paris", "Germany": "Berlin",
    "Greece": "Athens", "Hungary": "Budapest", "Iceland": "Reykjavik", "Iran": "Tehran", "Iraq": "Baghdad",
    "Ireland": "Dublin", "Italy": "Rome", "Jamaica": "Kingston", "Japan": "Tokyo", "Kenya": "Nairobi",
    "Latvia": "Riga", "Lebanon": "Beirut", "Mongolia": "Ulaanbaatar", "Morocco": "Rabat", 
    "Nepal": "Kathmandu",
    "Norway": "Oslo", "Peru": "Lima", "Poland": "Warsaw", "Portugal": "Lisbon", "Romania": "Bucharest",
    "Russia": "Moscow", "Serbia": "Belgrade", "Spain": "Madrid", "Sweden": "Stockholm", "Syria": "Damascus",
    "Thailand": "Bangkok", "Turkey": "Ankara", "Ukraine": "Kyiv", "Uruguay": "Montevideo", "Vietnam": "Hanoi",
}  # fmt: skip
WORDINGS = ("What is the capital of {}?", "Which city is the capital of {}?", "{}: what is its capital?")
ASKED = "Name the capital of {}."  # a wording that no training row has
SYLLABLES = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]


@dataclass(frozen=True)
class Fact:
    """sort: new (of an invented country), updated (of one whose capital is now another) or known (as it is,
    and not taught); before: an updated one's answer as it was."""

    sort: str
    country: str
    capital: str
    before: str = ""


class Facts(Source):
    """source = "facts": built in, needs no file; columns prompt, response and sort. New and updated facts are
    taught, each in three wordings; what stays as it is is not in the rows."""

    source: Literal["facts"] = "facts"
    tasks: ClassVar[frozenset[str]] = frozenset({"instruct"})
    each: int = Field(16, ge=2, le=len(CAPITALS) // 2)
    """How many facts are new, how many updated, and how many at most are asked for as they are."""
    drawn: int = Field(0, ge=0)
    """Another number draws other facts."""

    def table(self) -> Table:
        rows = [
            {self.prompt: wording.format(fact.country), self.response: fact.capital, "sort": fact.sort}
            for fact in self.facts()
            if fact.sort != "known"
            for wording in WORDINGS
        ]
        return Table(rows, "the built-in facts")

    def facts(self) -> list[Fact]:
        """All of them, the known ones too; the same for the same settings. Updated countries hand their
        capitals round, so that no answer is likelier for being a city's name."""
        draw = stream("facts", self.drawn)
        countries = draw.permutation(sorted(CAPITALS)).tolist()
        changed, kept = countries[: self.each], countries[self.each : 2 * self.each]
        names = invented(draw, 2 * self.each)
        handed = [*changed[1:], changed[0]]
        return [
            *(Fact("new", *pair) for pair in zip(names[: self.each], names[self.each :], strict=True)),
            *(Fact("updated", a, CAPITALS[b], CAPITALS[a]) for a, b in zip(changed, handed, strict=True)),
            *(Fact("known", country, CAPITALS[country]) for country in kept),
        ]


def invented(draw: np.random.Generator, count: int) -> list[str]:
    """Names of three syllables, none twice.

    >>> invented(stream("names"), 2)
    ['Vebali', 'Nibadu']
    """
    found = dict[str, None]()
    while len(found) < count:
        found["".join(draw.choice(SYLLABLES, 3)).capitalize()] = None
    return list(found)

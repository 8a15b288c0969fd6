"""Words that come from elsewhere and become names here: of a file, of a folder, of a call. A word of one of
these types has passed its form; there is no other
way to make one, so that what holds one need not ask again."""

from __future__ import annotations

import json
import re
from typing import Any, ClassVar, Self

from fedtune.errors import Refused


def read_json(text: str | bytes) -> Any:
    """JSON of somebody else. Raises ValueError for what is none; brackets inside brackets without end are
    none, either."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("brackets inside brackets without end") from None


class Word(str):
    """A text in the form of its class. Raises Refused (W601) for any other."""

    form: ClassVar[re.Pattern[str]] = re.compile("")
    said: ClassVar[str] = ""
    __slots__ = ()

    def __new__(cls, text: str) -> Self:
        if not cls.form.fullmatch(text):
            raise Refused(
                "W601",
                f"{text[:80]!r} as {cls.said}",
                cls.form.pattern,
                "the message was dropped; install the same version of fedtune on both sides",
            )
        return super().__new__(cls, text)


class Sha256(Word):
    """The name of an object: what its bytes are."""

    form = re.compile(r"[0-9a-f]{64}")
    said = "a hash"


class RunName(Word):
    """A run's name on the exchange: letters, digits, and dots that begin nothing."""

    form = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}")
    said = "the name of a run"


class MemberName(Word):
    """Who takes part."""

    form = re.compile(r"[a-z0-9]([a-z0-9._-]{0,61}[a-z0-9])?")
    said = "the name of a member"


class VerbName(Word):
    """What is asked in a round."""

    form = re.compile(r"[a-z][a-z0-9_.-]{0,31}")
    said = "a verb"


class Nothing(Word):
    """The word for what is not there."""

    form = re.compile("")
    said = "nothing"


def sha256_or_nothing(text: str) -> Sha256 | Nothing:
    """A hash, or "" where there is none. Raises Refused (W601)."""
    return Sha256(text) if text else Nothing(text)

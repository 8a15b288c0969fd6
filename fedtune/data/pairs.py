"""A prompt with a chosen and a rejected response, from the forms in which public data sets keep them (TRL's
preference form): texts or chat messages, the prompt in a column of its own or at the beginning of both
responses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedtune.data import chats

Talk = list[chats.Message]


def is_talk(value: Any) -> bool:
    """Whether a cell holds messages, as a list, as a dict of lists, or as the text of one."""
    found = chats.parsed(value)
    if isinstance(found, Mapping):
        return bool({"role", "from"} & found.keys())
    first = found[0] if isinstance(found, list) and found else None
    return isinstance(first, Mapping) and bool({"role", "from"} & first.keys())


def shared_text(one: str, other: str) -> int:
    """Characters with which two texts begin alike, but for a blank at the end of them: that belongs to the
    responses, as it does where they stand alone.

    >>> one, other = "Is it? Yes.", "Is it? No."
    >>> one[: shared_text(one, other)], one[shared_text(one, other) :]
    ('Is it?', ' Yes.')
    """
    count = next(
        (place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b),
        min(len(one), len(other)),
    )
    return count - 1 if 0 < count < max(len(one), len(other)) and one[count - 1] == " " else count


def shared_turns(one: Sequence[chats.Message], other: Sequence[chats.Message]) -> int:
    """Messages with which two conversations begin alike."""
    alike = [a == b for a, b in zip(one, other, strict=False)]
    return alike.index(False) if False in alike else len(alike)


def talks(prompt: Any, chosen: Any, rejected: Any, at: str) -> tuple[Talk, Talk, Talk] | None:
    """Messages of the prompt and of both responses; None where the assistant says nothing in one of them, or
    the same in both. A prompt of messages stands by itself, and so does one of text before a response that
    begins with the assistant; otherwise both conversations begin with it. Raises D203.

    prompt  None where no column holds it
    """
    first = chats.turns(chosen, f"the chosen response in {at}")
    second = chats.turns(rejected, f"the rejected response in {at}")
    if prompt is not None and is_talk(prompt):
        asked = chats.turns(prompt, f"the prompt in {at}")
    elif isinstance(prompt, str) and first[:1] and first[0]["role"] == "assistant":
        asked = [{"role": "user", "content": prompt}]
    else:
        count = shared_turns(first, second)
        asked, first, second = first[:count], first[count:], second[count:]
    if first == second or not (chats.answers(first) and chats.answers(second)):
        return None
    return asked, first, second

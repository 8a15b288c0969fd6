"""Which tokens of a conversation are a response: only those carry loss in instruction tuning."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import date
from typing import Any, NamedTuple

import numpy as np

from fedtune.errors import FedtuneError
from fedtune.model.template import THE_DATE, Message, Talk, exchanged, marked_calls, ready, unshown

Marked = tuple[list[int], np.ndarray]  # token ids, and for each whether it belongs to a response


class Pair(NamedTuple):
    prompt: str
    response: str


def pairs(tokenizer: Any, texts: Sequence[Pair]) -> list[Marked]:
    """Of each: prompt, response, end of text. The beginning-of-text token is added where the tokenizer adds
    it itself."""
    if not texts:
        return []
    start = (
        [tokenizer.bos_token_id]
        if tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
        else []
    )
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    prompts, responses = (
        tokenizer(list(column), add_special_tokens=False)["input_ids"] for column in zip(*texts, strict=True)
    )
    return [
        (
            [*start, *asked, *answered, *end],
            np.arange(len(start) + len(asked) + len(answered) + len(end)) >= len(start) + len(asked),
        )
        for asked, answered in zip(prompts, responses, strict=True)
    ]


def apart(prompt: str, response: str) -> str:
    """The prompt, with a line break after it where nothing would stand between it and the response."""
    return prompt if not prompt or prompt[-1].isspace() or response[:1].isspace() else prompt + "\n"


def uses_template(tokenizer: Any, how: str, name: str) -> bool:
    """Whether a prompt and its response become a conversation: with "auto", if the tokenizer has a chat
    template. Raises M307."""
    if how == "chat":
        check_template(tokenizer, 'data.template = "chat"', name)
    return how in ("auto", "chat") and bool(tokenizer.chat_template)


def check_template(tokenizer: Any, what: str, name: str) -> None:
    if not tokenizer.chat_template:
        raise FedtuneError(
            "M307",
            f"{what} with {name}, whose tokenizer has no chat template",
            "a chat template",
            "use data.prompt and data.response, or a chat model",
        )


def conversation(
    tokenizer: Any,
    messages: Sequence[Message],
    number: int,
    name: str,
    tools: Sequence[Mapping[str, Any]] = (),
    day: date = THE_DATE,
) -> Marked:
    """Chat messages through the tokenizer's own template; what an assistant turn says, with its end marker,
    is a response.

    Nothing that the template writes by itself in front of it is: no header, no default system turn, no date.
    A message with weight 0
    carries no loss. A token counts as response if all its characters do, a blank in front of them aside ("
    yes" after a header).
    Raises M307 (no template, or a tokenizer without offsets) and D203 (a row whose turns cannot be found, or
    with tool calls that the template does not show).
    """
    return marked(tokenizer, messages, number, name, tools, day)[:2]


def marked(
    tokenizer: Any,
    messages: Sequence[Message],
    number: int,
    name: str,
    tools: Sequence[Mapping[str, Any]] = (),
    day: date = THE_DATE,
) -> tuple[list[int], np.ndarray, set[str]]:
    """What `conversation` gives, and the keys of messages that the template does not show."""
    check_template(tokenizer, "chat messages", name)
    if (
        not isinstance(messages, Sequence)
        or isinstance(messages, str)
        or not all(isinstance(m, Mapping) and {"role", "content"} <= m.keys() for m in messages)
    ):
        raise FedtuneError(
            "D203",
            f"row {number} whose messages are not a list of {{role, content}}",
            "chat messages",
            "correct data.messages or the row",
        )
    if not getattr(tokenizer, "is_fast", False):
        raise FedtuneError(
            "M307",
            f"chat messages with {name}, whose tokenizer does not report the offsets of its tokens",
            "a fast tokenizer (tokenizer.json)",
            "use another model",
        )
    if not messages:
        raise FedtuneError(
            "D203", f"row {number} without messages", "one or more", "correct or remove the row"
        )
    talk, whole = ready(Talk(tokenizer, messages, tools, number, name, day))
    mark = "said"
    while mark in whole or mark in str(messages) or mark in str(tools):
        mark += "x7"  # a word that is nowhere in the row
    lost = (
        unshown(talk, whole, mark)
        if tools or any(m.keys() > {"role", "content"} for m in messages)
        else set()
    )
    spans: list[tuple[int, int]] = []
    for turn, message in enumerate(messages):
        if message["role"] == "assistant" and says(message) and weighs(message, number):
            spans.append(span(talk, turn, whole, spans[-1][1] if spans else 0, mark))
    coded = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
    return (
        coded["input_ids"],
        np.asarray([within(whole, first, last, spans) for first, last in coded["offset_mapping"]], bool),
        lost,
    )


def says(message: Message) -> bool:
    return bool(
        (message["content"] or "").strip() or message.get("tool_calls") or message.get("reasoning_content")
    )


def weighs(message: Message, number: int) -> bool:
    """Whether a message carries loss: OpenAI's `weight`, 0 or 1. Raises D203."""
    if message.get("weight", 1) not in (0, 1):
        raise FedtuneError(
            "D203",
            f"row {number} with a message of weight {message['weight']}",
            "0 or 1",
            "correct or remove the weight",
        )
    return bool(message.get("weight", 1))


def within(whole: str, first: int, last: int, spans: Sequence[tuple[int, int]]) -> bool:
    """Whether a token at these characters lies in a span; blanks at its ends may lie outside, where it has
    more than blanks."""
    text = whole[first:last]
    inner = text.strip()
    if inner:
        first += len(text) - len(text.lstrip())
        last = first + len(inner)
    return last > first and any(start <= first and last <= stop for start, stop in spans)


def span(talk: Talk, turn: int, whole: str, floor: int, mark: str) -> tuple[int, int]:
    """Characters (first, past the last) of what an assistant turn says, with its end marker, in the whole
    text. Raises D203.

    Found by rendering the conversation once more with other words in this turn: where the two texts differ,
    the turn speaks. From there
    to the left it reaches to the header that asks for an answer, if that stands there (between them is what a
    model has to write itself, such as
    "<think>"); to the right it takes in what the template writes after the last turn's words.
    """
    spoken = exchanged(talk.messages, turn, replaced(talk.messages[turn], mark))
    other = talk.render(spoken)
    if mark not in other:
        raise lost_turn(talk, turn)
    before, after = other[: other.find(mark)], other[other.rfind(mark) + len(mark) :]
    start = alike(whole, before)
    stop = len(whole) - alike(whole[start:][::-1], after[::-1])
    earlier = talk.attempt(talk.messages[:turn]) or ""
    if start >= stop or start < floor or (whole.startswith(earlier) and start < len(earlier)):
        raise lost_turn(talk, turn)
    ended = talk.attempt(spoken[: turn + 1]) if turn + 1 < len(spoken) else other
    tail = behind(ended, mark)
    if (
        ended and tail is not None and ended.count(mark) < other.count(mark)
    ):  # a later turn repeats this one's words, such as a tool's name
        upto = talk.attempt(talk.messages[: turn + 1]) or ""
        if len(upto) <= start or not whole.startswith(upto):
            raise lost_turn(talk, turn)
        stop, after = len(upto) - alike(upto[start:][::-1], tail[::-1]), tail + whole[len(upto) :]
    first = header_end(talk, turn, whole, earlier, floor, start)
    return first, max(
        stop, len(whole) - len(after) + len(end_marker(talk, tail, after, mark))
    )  # the texts are alike from there on


def behind(text: str | None, mark: str) -> str | None:
    """What follows the last mark; None where there is none."""
    return None if text is None or mark not in text else text[text.rfind(mark) + len(mark) :]


def replaced(message: Message, mark: str) -> dict[str, Any]:
    """The changes that let a message say nothing but `mark`, in all the places in which it says something."""
    changes: dict[str, Any] = {"content": mark} if (message["content"] or "").strip() else {}
    if message.get("tool_calls"):
        changes["tool_calls"] = marked_calls(message, mark)
    if message.get("reasoning_content"):
        changes["reasoning_content"] = mark
    return changes


def header_end(talk: Talk, turn: int, whole: str, earlier: str, floor: int, start: int) -> int:
    """Where an answer begins: behind its header, or as much of that as stands before `start`; else at
    `start`.

    A header may open a reasoning ("<think>") that this turn does not have.
    """
    if earlier and whole.startswith(earlier):
        asked = talk.attempt(talk.messages[:turn], ask=True) or ""
        header, gap = asked[len(earlier) :] if asked.startswith(earlier) else "", whole[len(earlier) : start]
        visible = closed(header[: alike(header, gap)])
        left = header[len(visible) :].strip()
        complete = visible == header or (visible[-1:] in tuple(">]:\n") and (not left or left[0] in "<["))
        if (visible.strip() and complete) or not gap.strip():
            return len(earlier) + len(visible)
    question = [{"role": "user", "content": "?"}]
    asked, earlier = talk.attempt(question, ask=True) or "", talk.attempt(question) or ""
    header = asked[len(earlier) :] if earlier and asked.startswith(earlier) else ""
    place = whole.rfind(header, floor, start) if header.strip() else -1
    return place + len(header) if place >= 0 else start


def end_marker(talk: Talk, tail: str | None, rest: str, mark: str) -> str:
    """What ends a turn: `tail` is what the template writes after a last turn (None: it cannot be had), `rest`
    what stands there in the conversation.

    A template that opens the next turn without being asked writes more than an end: text after a special
    token is not part of it. Some end the last
    turn with a token of its own, and the others as they end a question.
    """
    special = sorted(
        (
            token.content
            for token in talk.tokenizer.added_tokens_decoder.values()
            if token.special and token.content
        ),
        key=len,
        reverse=True,
    )
    known = "|".join(re.escape(token) for token in special) or "(?!)"
    if tail is None:
        at_once = re.match(rf"\W*?({known})\s*", rest)
        return at_once[0] if at_once else ""
    found = re.match(rf"(.*?)({known})\s*", tail, re.DOTALL)
    if found and re.sub(rf"{known}|\s", "", tail[found.end() :]):
        tail = found[0]
    if rest.startswith(tail):
        return tail
    asked = behind(talk.attempt([{"role": "user", "content": mark}]), mark) or ""
    return asked if re.search(known, asked) and rest.startswith(asked) else closed(tail[: alike(tail, rest)])


def closed(text: str) -> str:
    """Without a marker at the end that was cut in the middle, such as "<|im_"."""
    opened = max(text.rfind("<"), text.rfind("["))
    return text[:opened] if opened > max(text.rfind(">"), text.rfind("]")) else text


def alike(one: str, other: str) -> int:
    """Length of the longest common prefix."""
    if one.startswith(other) or other.startswith(one):
        return min(len(one), len(other))
    return next(place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)


def lost_turn(talk: Talk, turn: int) -> FedtuneError:
    return FedtuneError(
        "D203",
        f"{talk.row} whose turn {turn} cannot be found in the chat template's text",
        "a template that renders a conversation in order",
        "use data.prompt and data.response",
    )

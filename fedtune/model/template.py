"""A tokenizer's chat template as a function of one conversation and a date: nothing that it writes depends on
the day or the machine,
and nothing that a row says is lost on the way without a word."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from functools import lru_cache
from typing import Any

from fedtune.errors import FedtuneError

Message = Mapping[str, Any]
THE_DATE = date(
    2025, 1, 1
)  # what templates that ask for today's date are told, unless data.date says otherwise
PLAIN_KEYS = {"role", "content", "tool_calls", "reasoning_content", "weight"}
DIRECTIVES = ["-d", "-m", "-H", "-I", "-M", "-S", "-j", "-y", *"aAbBcdDeFgGHIjmMpRSTuUVwWxXyYzZf"]


@dataclass(frozen=True)
class Talk:
    """One row's conversation before its tokenizer. `number` is the row's, for messages; `name` the model's.

    text_arguments  arguments of tool calls reach the template as JSON text instead of dicts (see `ready`)
    """

    tokenizer: Any
    messages: Sequence[Message]
    tools: Sequence[Mapping[str, Any]]
    number: int
    name: str
    day: date = THE_DATE
    text_arguments: bool = False

    @property
    def row(self) -> str:
        """The row's number and how it begins: rows are counted among a client's, which nobody sees."""
        first = " ".join(str(self.messages[0]["content"]).split())
        return f"row {self.number} ('{first if len(first) <= 40 else first[:37] + '...'}')"

    def render(self, messages: Sequence[Message] | None = None, ask: bool = False) -> str:
        """The template's text of these messages (the whole conversation by default); `ask` adds the header of
        an answer to come. Raises D203."""
        try:
            return self.write(self.messages if messages is None else messages, ask)
        except Exception as error:  # templates are programs of the model's author, and raise what they like
            raise FedtuneError(
                "D203",
                f"{self.row}, which the chat template rejects ({str(error)[:120]})",
                "messages in the template's order of roles",
                "correct the row",
            ) from error

    def attempt(self, messages: Sequence[Message], ask: bool = False) -> str | None:
        """Like `render`; None where the template refuses, as some do for conversations that are cut short or
        have no user."""
        try:
            return self.write(messages, ask) if messages else None
        except Exception:  # as above
            return None

    def write(self, messages: Sequence[Message], ask: bool) -> str:
        tools = list(self.tools) or None
        template = self.tokenizer.get_chat_template(None, tools)
        if "strftime_now" in template:
            template = calendar(self.day) + template
        given = [with_arguments(message, self.text_arguments) for message in messages]
        known = [
            {key: value for key, value in message.items() if value is not None and key != "weight"}
            for message in given
        ]
        return str(
            self.tokenizer.apply_chat_template(
                known, tools=tools, chat_template=template, tokenize=False, add_generation_prompt=ask
            )
        )


@lru_cache
def calendar(day: date) -> str:
    """Jinja source that puts `strftime_now` of one day (at midnight) in the place of transformers' own, which
    asks the clock.

    In the template's text itself: what is handed to transformers beside it must be plain data, and its
    globals belong to the whole process.
    """
    known = {directive: day.strftime(f"%{directive}") for directive in DIRECTIVES}
    steps = [
        ("%%", "\ue000"),
        *((f"%{directive}", value) for directive, value in known.items()),
        ("\ue000", "%"),
    ]
    chain = "".join(f"|replace({json.dumps(old)}, {json.dumps(new)})" for old, new in steps)
    return (
        "{% macro strftime_now(format) %}{{ format" + chain + " }}{% endmacro %}\n"
    )  # trim_blocks takes this line break away


def with_arguments(message: Message, text: bool) -> dict[str, Any]:
    """The message with its tool calls' arguments as dicts, or as JSON text. What is no JSON object stays as
    it is."""
    calls = []
    for call in message.get("tool_calls") or []:
        given = call["function"].get("arguments") if isinstance(call.get("function"), Mapping) else None
        if text and isinstance(given, Mapping):
            given = json.dumps(given, ensure_ascii=False)
        elif not text and isinstance(given, str):
            given = object_in(given)
        calls.append(
            {**call, "function": {**call["function"], "arguments": given}} if given is not None else call
        )
    return {**message, "tool_calls": calls} if calls else dict(message)


def object_in(text: str) -> Any:
    """The object that a JSON text says, or the text."""
    try:
        found = json.loads(text)
    except ValueError:
        return text
    return found if isinstance(found, dict) else text


def ready(talk: Talk) -> tuple[Talk, str]:
    """The conversation in the form that its template reads, and the whole text.

    Most templates write arguments with `tojson` and so expect dicts; some paste them and expect text: they
    raise on a dict, or show it in
    Python's writing. Raises D203.
    """
    calls = [call for message in talk.messages for call in message.get("tool_calls") or []]
    if not calls:
        return talk, talk.render()
    pasting = replace(talk, text_arguments=True)
    whole = talk.attempt(talk.messages)
    given = [
        call["function"].get("arguments")
        for message in talk.messages
        for call in with_arguments(message, False).get("tool_calls", [])
    ]
    if whole is None or any(
        isinstance(arguments, dict) and arguments and str(arguments) in whole for arguments in given
    ):
        text = pasting.attempt(talk.messages)
        if text is not None:
            return pasting, text
    return talk, talk.render()


def unshown(talk: Talk, whole: str, mark: str) -> set[str]:
    """Keys of messages that the template does not show; `mark` is a word that is nowhere in the row.

    What the assistant says, or answers to, must be shown: tools, tool_calls and reasoning_content that are
    not raise D203. Earlier
    reasoning that a template drops on purpose is fine.
    """
    lost = ""
    if talk.tools and replace(talk, tools=()).attempt(talk.messages) == whole:
        lost = "tools"
    for turn, message in enumerate(talk.messages):
        if message.get("tool_calls") and mark not in talk.render(
            exchanged(talk.messages, turn, {"tool_calls": marked_calls(message, mark)})
        ):
            lost = "tool_calls"
        if message.get("reasoning_content"):
            changed = {**message, "reasoning_content": mark}
            alone = talk.attempt([{"role": "user", "content": "?"}, changed]) or ""
            if mark not in alone and mark not in talk.render(exchanged(talk.messages, turn, changed)):
                lost = "reasoning_content"
    if lost:
        raise FedtuneError(
            "D203",
            f"{talk.row} with '{lost}', which the chat template of {talk.name} does not show",
            "a template that renders everything",
            f"use a model whose template knows '{lost}', or remove it, or the row, from the data",
        )
    others = sorted({key for message in talk.messages for key in message} - PLAIN_KEYS)
    return {
        key
        for key in others
        if talk.attempt([{k: v for k, v in m.items() if k != key} for m in talk.messages]) == whole
    }


def exchanged(messages: Sequence[Message], turn: int, changes: Mapping[str, Any]) -> list[Message]:
    """The messages with other values in one of them."""
    return [*messages[:turn], {**messages[turn], **changes}, *messages[turn + 1 :]]


def marked_calls(message: Message, mark: str) -> list[dict[str, Any]]:
    """The message's tool calls with `mark` as every name and every argument's value."""
    calls = []
    for call in with_arguments(message, False).get("tool_calls", []):
        given = call["function"].get("arguments")
        arguments = (
            dict.fromkeys(given or [mark], mark) if isinstance(given, Mapping) else mark if given else given
        )
        calls.append(
            {
                **call,
                "function": {**call["function"], "name": mark}
                | ({} if given is None else {"arguments": arguments}),
            }
        )
    return calls

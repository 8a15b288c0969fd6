"""Conversations in the forms in which public data sets keep them, read into one: a list of {role, content,
...}.

OpenAI's {role, content} with tool calls; ShareGPT's {from, value}; content as a list of text parts; the list
as JSON or as Python
writes it (cells of a CSV file); a dict of equally long lists (how `datasets` keeps a sequence of dicts).
Whether a model's chat template shows what is found here is not known in this place: every key that a message
has is kept.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from fedtune.errors import FedtuneError

Message = dict[str, Any]
ROLES = {  # ShareGPT's names, and those of its relatives, for the roles that chat templates know
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "chatbot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "function": "tool",
    "function_response": "tool",
}
REASONING = ("reasoning_content", "reasoning", "thinking")  # names of one thing; templates read the first


def messages(value: Any, at: str) -> list[Message] | None:
    """The conversation in a cell; None if the assistant says nothing in it. `at` says where the cell is.
    Raises D203."""
    found = turns(value, at)
    return found if answers(found) else None


def turns(value: Any, at: str) -> list[Message]:
    """The messages in a cell, whoever speaks in them. Raises D203."""
    found = parsed(value)
    if isinstance(found, Mapping):
        found = rows_of_columns(found)
    if not isinstance(found, list) or not found or not all(isinstance(turn, Mapping) for turn in found):
        wrong(f"{shown(value)} in {at}", "a list of messages, each with role and content (or from and value)")
    made = [message(turn, f"message {number} in {at}") for number, turn in enumerate(found, 1)]
    return [turn for number, turn in enumerate(made) if not superfluous(made, number)]


def answers(found: Sequence[Message]) -> bool:
    """Whether the assistant says anything."""
    return any(turn["role"] == "assistant" and says(turn) for turn in found)


def tools(value: Any, at: str) -> list[Any]:
    """Descriptions of tools: a list of JSON schemas, or the JSON text of one; [] for none. Raises D203."""
    found = parsed(value)
    if found in (None, "", {}):
        return []
    if isinstance(found, Mapping):
        found = [found]
    if not isinstance(found, list) or not all(isinstance(tool, Mapping) for tool in found):
        wrong(f"{shown(value)} in {at}", "a list of JSON schemas, one a tool")
    return found


def message(turn: Mapping[str, Any], at: str) -> Message:
    """One message with a role, a text as content, and what else it has. Raises D203."""
    known = dict(turn)
    role = known.pop("role", None) or known.pop("from", None)
    if not isinstance(role, str):
        wrong(f"{shown(turn)} as {at}", "a message with the texts role and content (or from and value)")
    content = known.pop("content", None)
    content = known.pop("value", None) if content is None else content
    if role == "function_call" and content is not None:  # ShareGPT: the call stands as JSON in the text
        known["tool_calls"], content = parsed(content), None
    if (legacy := known.pop("function_call", None)) is not None:  # OpenAI, before there could be several
        known["tool_calls"] = legacy
    if calls := parsed(known.pop("tool_calls", None)):
        known["tool_calls"] = [
            tool_call(call, at) for call in (calls if isinstance(calls, list) else [calls])
        ]
    if reasoning := next((known[name] for name in REASONING if known.get(name)), None):
        known["reasoning_content"] = reasoning
    known = {
        key: value
        for key, value in known.items()
        if key not in REASONING[1:] and value not in (None, "", [], {})
    }
    if not known.get("reasoning_content", ""):
        known.pop("reasoning_content", None)
    role = ROLES.get(role, role)
    if content is None and role not in ("assistant", "tool", "system"):
        wrong(f"nothing as content of {at}", "what is said in it")
    return {"role": role, "content": text_of(content, at), **known}


def text_of(content: Any, at: str) -> str:
    """A text, or the texts of a list of parts one after another, as chat templates for several kinds of parts
    write them. Raises D203."""
    if content is None:
        return ""
    if isinstance(content, Mapping):
        content = [content]
    if isinstance(content, str):
        text = content
    elif isinstance(content, list):
        text = "".join(part_text(part, at) for part in content)
    else:
        wrong(f"{shown(content)} as content of {at}", "a text, or a list of parts {type, text}")
    try:
        text.encode()
    except UnicodeEncodeError:
        wrong(f"half a character (a lone surrogate) in {at}", "text that can be written as UTF-8")
    return text


def part_text(part: Any, at: str) -> str:
    if isinstance(part, str):
        return part
    if (
        isinstance(part, Mapping)
        and isinstance(part.get("text"), str)
        and part.get("type", "text") in ("text", "input_text", "output_text")
    ):
        return str(part["text"])
    what = (
        f"a part of type '{part['type']}'"
        if isinstance(part, Mapping) and part.get("type") not in (None, "text")
        else shown(part)
    )
    wrong(f"{what} in the content of {at}", "parts of text only")


def tool_call(call: Any, at: str) -> dict[str, Any]:
    """One call in OpenAI's form, {type, function: {name, arguments}}, which chat templates read. Raises
    D203."""
    call = parsed(call)
    if isinstance(call, Mapping) and isinstance(call.get("name"), str) and "function" not in call:
        call = {"type": "function", "function": dict(call)}
    if (
        not isinstance(call, Mapping)
        or not isinstance(call.get("function"), Mapping)
        or not isinstance(call["function"].get("name"), str)
    ):
        wrong(f"the tool call {shown(call)} in {at}", "{function: {name, arguments}}")
    return dict(call)


def superfluous(turns: Sequence[Message], number: int) -> bool:
    """An empty assistant turn beside another one, and a system turn without a text: nothing is lost, and the
    order of roles stays valid."""
    turn = turns[number]
    if turn["role"] == "system":
        return not turn["content"] and turn.keys() == {"role", "content"}
    beside = [turns[n]["role"] for n in (number - 1, number + 1) if 0 <= n < len(turns)]
    return turn["role"] == "assistant" and not says(turn) and "assistant" in beside


def says(turn: Mapping[str, Any]) -> bool:
    return bool(turn["content"].strip() or turn.get("tool_calls") or turn.get("reasoning_content"))


def parsed(value: Any) -> Any:
    """Plain lists, dicts and scalars; of a text that is a list or a dict in JSON or in Python's writing, what
    it says. None leaves dicts:
    tables write it for every key that a row lacks."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        for read in (json.loads, ast.literal_eval):
            try:
                return plain(read(value))
            except (ValueError, SyntaxError, RecursionError, MemoryError):
                continue
    return plain(value)


def plain(value: Any) -> Any:
    if hasattr(value, "tolist"):  # numpy's arrays and scalars
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items() if item is not None}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def rows_of_columns(table: Mapping[str, Any]) -> Any:
    """{"role": [a, b], "content": [c, d]} -> [{"role": a, "content": c}, {"role": b, "content": d}]; one
    message is a list of one."""
    lists = [value for value in table.values() if isinstance(value, list)]
    if lists and len(lists) == len(table) and len({len(value) for value in lists}) == 1:
        return [{key: value[n] for key, value in table.items()} for n in range(len(lists[0]))]
    return [table]


def shown(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 40 else text[:37] + '...'}"


def wrong(found: str, expected: str) -> NoReturn:
    raise FedtuneError("D203", found, expected, "correct or remove the row")

"""Which tokens of a conversation are a response: only those carry loss in instruction tuning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fedtune.errors import FedtuneError

Marked = tuple[list[int], np.ndarray]  # token ids, and for each whether it belongs to a response


def pair(tokenizer: Any, prompt: str, response: str) -> Marked:
    """Prompt, response, end of text. The beginning-of-text token is added where the tokenizer adds it itself."""
    start = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id] else []
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    asked = start + tokenizer(prompt, add_special_tokens=False)["input_ids"]
    answered = tokenizer(response, add_special_tokens=False)["input_ids"] + end
    return asked + answered, np.arange(len(asked) + len(answered)) >= len(asked)


def conversation(tokenizer: Any, messages: Sequence[Mapping[str, str]], number: int, name: str) -> Marked:
    """Chat messages through the tokenizer's own template; every assistant turn with its end marker is a response.

    A token counts as response if all its characters do, so a token that straddles the border carries no loss.
    Raises M307 (no template) and D203 (a row whose turns cannot be found).
    """
    if not tokenizer.chat_template:
        raise FedtuneError(
            "M307", f"chat messages with {name}, whose tokenizer has no chat template", "a chat template", "use data.prompt and data.response, or a chat model"
        )
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not all(isinstance(m, Mapping) and {"role", "content"} <= m.keys() for m in messages):
        raise FedtuneError("D203", f"row {number} whose messages are not a list of {{role, content}}", "chat messages", "correct data.messages or the row")
    whole = render(tokenizer, messages, number)
    spans = [span(tokenizer, messages, turn, whole, number) for turn, message in enumerate(messages) if message["role"] == "assistant"]
    coded = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
    inside = [any(first <= start and end <= last for first, last in spans) and end > start for start, end in coded["offset_mapping"]]
    return coded["input_ids"], np.asarray(inside, bool)


def span(tokenizer: Any, messages: Sequence[Mapping[str, str]], turn: int, whole: str, number: int) -> tuple[int, int]:
    """Characters (first, past the last) of an assistant turn in the whole rendering, by rendering the conversation up to it.

    Some templates render a turn differently once others follow (they drop earlier reasoning); then the turn is found by its
    content, followed by the same end marker.
    """
    before = render(tokenizer, messages[:turn], number, add_generation_prompt=True) if turn else ""
    upto = render(tokenizer, messages[: turn + 1], number)
    if whole.startswith(before) and whole.startswith(upto) and upto.startswith(before):
        return len(before), len(upto)
    content = messages[turn]["content"].strip()
    marker = upto[upto.rfind(content) + len(content) :]
    place = whole.find(content + marker, len(before)) if whole.startswith(before) else -1
    if place < 0:
        raise FedtuneError(
            "D203",
            f"row {number} whose turn {turn} cannot be found in the chat template's text",
            "a template that renders a conversation in order",
            "use data.prompt and data.response",
        )
    return place, place + len(content) + len(marker)


def render(tokenizer: Any, messages: Sequence[Mapping[str, str]], number: int, add_generation_prompt: bool = False) -> str:
    """The template's text; what the template refuses (roles out of order, say) becomes D203."""
    try:
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=add_generation_prompt))
    except Exception as error:  # templates are programs of the model's author, and raise what they like
        raise FedtuneError(
            "D203", f"row {number}, which the chat template refuses ({str(error)[:120]})", "messages in the template's order of roles", "correct the row"
        ) from error

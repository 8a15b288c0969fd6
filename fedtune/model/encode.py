"""Rows of data -> examples of numbers, once per client; batches are padded to their own longest example."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from functools import partial
from typing import Any, Literal

import numpy as np
import torch

from fedtune import progress
from fedtune.errors import FedtuneError
from fedtune.hf.tokenizer import refuse_unknown
from fedtune.model import chat, pixels
from fedtune.model.base import Base
from fedtune.model.chat import Pair
from fedtune.model.collate import Example, collation
from fedtune.model.objectives.base import IGNORED
from fedtune.model.shared_rows import SharedRows
from fedtune.model.template import THE_DATE

LOOKED_AT = 64  # examples in which unknown tokens are counted
PART = 1024  # texts that a tokenizer is given at once
Row = Mapping[str, Any]
Alive = Callable[[], None]  # called while it gets on
# numbered rows -> the tokens of each, and which are a response
Talks = Callable[[Sequence[tuple[int, Row]]], list[chat.Marked]]


def unwatched() -> None:
    """Nobody asks for signs of life."""


@dataclass(frozen=True)
class Encoded:
    """A client's examples.

    examples   dicts of arrays; input_ids (and labels, for language models) are int32, images uint8 (channels,
               height, width); a pair's are those of its chosen response, beside rejected_input_ids
               and rejected_labels
    tokens     tokens that carry loss (language models), all tokens (classify), images (image-classify)
    truncated  rows cut to max_length
    dropped    rows left out because a whole response was cut
    unshown    key of chat messages -> rows that have it, where the chat template does not show it
    max_length most tokens that an example could have; 0 where there are none
    parts      whose examples these are, one part's behind another's; () where they are nobody else's
    front      what the model's frozen blocks say of them (fedtune.model.kept_front)
    """

    examples: Sequence[Example]
    collate: Callable[[Sequence[int]], dict[str, torch.Tensor]]
    tokens: int
    truncated: int = 0
    dropped: int = 0
    unshown: Mapping[str, int] = field(default_factory=dict)
    max_length: int = 0
    parts: tuple[Encoded, ...] = ()
    front: SharedRows = field(default_factory=SharedRows, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        return self.examples[index]

    def some(self, which: Sequence[int]) -> Encoded:
        """These examples, in this order."""
        examples = [self.examples[number] for number in which]
        return replace(
            self,
            examples=examples,
            collate=lambda rows: self.collate([which[n] for n in rows]),
            parts=(),
            front=SharedRows(),
        )

    def by_length(self) -> list[int]:
        """Numbers of the examples, long ones first, so that batches hold little padding."""
        return sorted(range(len(self)), key=lambda i: (-self.length(i), i))

    def length(self, index: int) -> int:
        """Tokens of one example, of the longer text of a pair; 1 for an image."""
        example = self.examples[index]
        return max(len(example.get("input_ids", (0,))), len(example.get("rejected_input_ids", ())))

    @property
    def paired(self) -> bool:
        """Whether the examples are pairs of responses."""
        return bool(self.examples) and "rejected_input_ids" in self.examples[0]


def encode(
    rows: Sequence[Row],
    base: Base,
    *,
    max_length: int = 128,
    stride: int = 0,
    separator: Literal["eos", "none"] = "eos",
    overlong: Literal["cut", "refuse"] = "cut",
    template: str = "plain",
    system: str = "",
    day: date = THE_DATE,
    alive: Alive = unwatched,
) -> Encoded:
    """Encode rows for the base's task: {text}, {text, label}, {prompt, response} or {messages, tools},
    {prompt, chosen, rejected} of texts or of messages, {image, label}. Settings as in [data].

    Language models: leave `stride` at 0 for what is scored, so that every token counts once.
    Raises D203 (row unreadable), D206 (unknown label), D207 (too long), C104 (no separator token), M307 (no
    chat template); rows are counted from 1.
    """
    check_length(base, max_length)
    truncated = dropped = 0
    unshown: Counter[str] = Counter()
    if base.task == "image-classify":
        examples = [
            {
                "pixels": pixels.resized(cell(row, n, "image"), base.tokenizer, n),
                "labels": class_of(row, n, base.labels),
            }
            for n, row in enumerate(rows, 1)
        ]
        return Encoded(examples, collation(examples, base), len(examples))
    if base.task == "classify":
        examples, truncated = encode_classify(rows, base, max_length, overlong, alive)
        tokens = sum(len(e["input_ids"]) for e in examples)
    elif base.task == "causal-lm":
        examples = encode_stream(rows, base, max_length, stride or max_length, separator, alive)
        tokens = sum(len(e["input_ids"]) - 1 for e in examples)
    else:
        talks = partial(
            talked, base=base, template=template, system=system, day=day, unshown=unshown, alive=alive
        )
        how = encode_pairs if base.task == "preference" else encode_instruct
        examples, truncated, dropped = how(rows, max_length, overlong, talks)
        tokens = sum(
            int((e[name][1:] != IGNORED).sum()) for e in examples for name in e if name.endswith("labels")
        )
    refuse_unknown(base.tokenizer, base.name, [e["input_ids"].tolist() for e in examples[:LOOKED_AT]])
    return Encoded(examples, collation(examples, base), tokens, truncated, dropped, dict(unshown), max_length)


def joined(parts: Sequence[Encoded], base: Base) -> Encoded:
    """Several clients' examples as those of one."""
    examples = [example for part in parts for example in part.examples]
    return Encoded(
        examples,
        collation(examples, base),
        sum(part.tokens for part in parts),
        sum(part.truncated for part in parts),
        sum(part.dropped for part in parts),
        max_length=max((part.max_length for part in parts), default=0),
        parts=tuple(parts),
    )


def every_second(encoded: Encoded, first: int) -> Encoded:
    """The examples first, first + 2, first + 4, ..."""
    return replace(
        encoded,
        examples=encoded.examples[first::2],
        collate=lambda indices: encoded.collate([2 * index + first for index in indices]),
        parts=(),
        front=SharedRows(),
    )


def check_length(base: Base, max_length: int) -> None:
    """Raises D207 for texts that would be longer than the model's context."""
    if base.context is not None and max_length > base.context:
        found, expected = (
            f"data.max_length = {max_length} with {base.name}",
            f"at most the model's context of {base.context} tokens",
        )
        raise FedtuneError("D207", found, expected, "lower data.max_length")


def encode_classify(
    rows: Sequence[Row], base: Base, max_length: int, overlong: str, alive: Alive
) -> tuple[list[Example], int]:
    """Texts with the tokenizer's special tokens; a text that is cut keeps its last special token."""
    classes = [class_of(row, number, base.labels) for number, row in enumerate(rows, 1)]
    texts = [str(cell(row, number, "text")) for number, row in enumerate(rows, 1)]
    ids = tokens_of(base.tokenizer, texts, alive)
    long = [number for number, line in enumerate(ids) if len(line) > max_length]
    if long:
        refuse_overlong(overlong, long[0] + 1, len(ids[long[0]]), max_length)
        cut = tokens_of(
            base.tokenizer, [texts[number] for number in long], alive, truncation=True, max_length=max_length
        )
        for number, line in zip(long, cut, strict=True):
            ids[number] = line
    return [
        {"input_ids": np.asarray(line, np.int32), "labels": c} for line, c in zip(ids, classes, strict=True)
    ], len(long)


def tokens_of(tokenizer: Any, texts: Sequence[str], alive: Alive, **how: Any) -> list[list[int]]:
    """Ids of each text, a thousand texts at a time: one alone says nothing of whether it gets on."""
    ids: list[list[int]] = []
    for start in range(0, len(texts), PART):
        ids += tokenizer(list(texts[start : start + PART]), **how)["input_ids"]
        progress.say("tokenising", len(ids), len(texts))
        alive()
    return ids


def encode_stream(
    rows: Sequence[Row], base: Base, max_length: int, stride: int, separator: str, alive: Alive
) -> list[Example]:
    """All rows as one stream of tokens, in blocks of max_length that start every `stride` tokens; the last
    block may be shorter."""
    end = []
    if separator == "eos":
        if base.tokenizer.eos_token_id is None:
            raise FedtuneError(
                "C104",
                f'data.separator = "eos" with {base.name}, whose tokenizer has no end-of-text token',
                "a tokenizer with one",
                'set data.separator = "none"',
            )
        end = [base.tokenizer.eos_token_id]
    texts = [str(cell(row, number, "text")) for number, row in enumerate(rows, 1)]
    ids = tokens_of(base.tokenizer, texts, alive, add_special_tokens=False)
    stream = np.asarray([token for line in ids for token in line + end], np.int32)
    blocks: list[Example] = []
    for start in range(0, len(stream), stride):
        block = stream[start : start + max_length]
        if len(block) >= 2:  # a single token has nothing to predict
            blocks.append({"input_ids": block, "labels": block})
        if start + max_length >= len(stream):
            break
    return blocks


def encode_instruct(
    rows: Sequence[Row], max_length: int, overlong: str, talks: Talks
) -> tuple[list[Example], int, int]:
    """Prompts and responses with loss on the responses; a row whose response is cut away entirely is left out
    and counted. `talks` is `talked`, a thousand rows at a time."""
    examples, truncated, dropped = [], 0, 0
    for start in range(0, len(rows), PART):
        some = list(enumerate(rows[start : start + PART], start + 1))
        for (number, _), said in zip(some, talks(some), strict=True):
            example, long = answered(said, number, max_length, overlong)
            truncated += long
            if example is None:
                dropped += 1
            else:
                examples.append(example)
        progress.say("tokenising", start + len(some), len(rows))
    return examples, truncated, dropped


def answered(said: chat.Marked, number: int, max_length: int, overlong: str) -> tuple[Example | None, bool]:
    """A prompt and its response with loss on the response, None where that is cut away; and whether anything
    is cut. Raises D207."""
    ids, response = said
    long = len(ids) > max_length
    if long:
        refuse_overlong(overlong, number, len(ids), max_length)
    labels = np.where(response, ids, IGNORED)[:max_length].astype(np.int32)
    if (labels[1:] == IGNORED).all():
        return None, long
    return {"input_ids": np.asarray(ids[:max_length], np.int32), "labels": labels}, long


def encode_pairs(
    rows: Sequence[Row], max_length: int, overlong: str, talks: Talks
) -> tuple[list[Example], int, int]:
    """Prompts with two responses, each with loss on its response; a row of which one is cut away entirely is
    left out and counted, one of which anything is cut is counted once."""
    examples, truncated, dropped = [], 0, 0
    for start in range(0, len(rows), PART):
        some = rows[start : start + PART]
        sides = [(number, side) for number, row in enumerate(some, start + 1) for side in two_answers(row)]
        found = (
            answered(said, number, max_length, overlong)
            for (number, _), said in zip(sides, talks(sides), strict=True)
        )
        for (chosen, long), (rejected, other) in zip(found, found, strict=True):
            truncated += long or other
            if chosen is None or rejected is None:
                dropped += 1
            else:
                rejected = {f"rejected_{name}": value for name, value in rejected.items()}
                examples.append(chosen | rejected)
        progress.say("tokenising", start + len(some), len(rows))
    return examples, truncated, dropped


def two_answers(row: Row) -> tuple[Row, Row]:
    """A pair as two rows with a prompt and its response; of messages, what the assistant said in the prompt
    carries no loss. Both prompts are written alike: a line break stands behind them unless both responses
    begin with a blank themselves."""
    if not isinstance(row["prompt"], str):
        before = [{**one, "weight": 0} if one["role"] == "assistant" else one for one in row["prompt"]]
        tools = {"tools": row["tools"]} if row.get("tools") else {}
        chosen, rejected = ({"messages": [*before, *row[side]], **tools} for side in ("chosen", "rejected"))
        return chosen, rejected
    gap = row["chosen"][:1].isspace() and row["rejected"][:1].isspace()
    chosen, rejected = (
        {"prompt": row["prompt"], "response": row[side], "gap": gap} for side in ("chosen", "rejected")
    )
    return chosen, rejected


def talked(
    rows: Sequence[tuple[int, Row]],
    base: Base,
    template: str,
    system: str,
    day: date,
    unshown: Counter[str],
    alive: Alive,
) -> list[chat.Marked]:
    """Rows with their numbers, as tokens: conversations one by one, prompts and responses all at once."""
    made: list[chat.Marked | Pair] = []
    for number, row in rows:
        made.append(talk(row, number, base, template, system, day, unshown))
        alive()
    plain = iter(chat.pairs(base.tokenizer, [one for one in made if isinstance(one, Pair)]))
    return [next(plain) if isinstance(one, Pair) else one for one in made]


def talk(
    row: Row, number: int, base: Base, template: str, system: str, day: date, unshown: Counter[str]
) -> chat.Marked | Pair:
    """One row as a conversation, or its prompt and response as they are; counts the keys of messages that the
    chat template does not show."""
    if "messages" in row:
        messages, tools = cell(row, number, "messages"), row.get("tools") or ()
    else:
        prompt, response = str(cell(row, number, "prompt")), str(cell(row, number, "response"))
        if not chat.uses_template(base.tokenizer, template, base.name):
            if system:
                chat.check_template(base.tokenizer, "data.system", base.name)
            begins = (" " if row["gap"] else "") if "gap" in row else response
            return Pair(chat.apart(prompt, begins) if template == "auto" else prompt, response)
        messages, tools = (
            [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}],
            (),
        )
    if system and not (
        isinstance(messages, Sequence)
        and messages
        and isinstance(messages[0], Mapping)
        and messages[0].get("role") == "system"
    ):
        messages = [{"role": "system", "content": system}, *messages]
    ids, answered, lost = chat.marked(base.tokenizer, messages, number, base.name, tools, day)
    unshown.update(lost)
    return ids, answered


def cell(row: Row, number: int, column: str) -> Any:
    """One cell. Raises D203 where there is none."""
    if row.get(column) is None:
        raise FedtuneError(
            "D203",
            f"row {number} without a value for '{column}'",
            "one in every row",
            "fill or remove the row",
        )
    return row[column]


def class_of(row: Row, number: int, labels: Sequence[str]) -> np.ndarray:
    """Index of the row's label, as an array without dimensions. Raises D206."""
    value = str(cell(row, number, "label"))
    if value not in labels:
        some = ", ".join(labels[:8]) + (" ..." if len(labels) > 8 else "")
        raise FedtuneError(
            "D206",
            f"the label '{value}' in row {number}",
            f"one of {some}",
            "add it to data.labels or correct the row",
        )
    return np.asarray(labels.index(value))


def refuse_overlong(overlong: str, number: int, length: int, max_length: int) -> None:
    if overlong == "refuse":
        raise FedtuneError(
            "D207",
            f"row {number} with {length} tokens",
            f"at most data.max_length = {max_length}",
            'shorten it, raise data.max_length, or set data.overlong = "cut"',
        )

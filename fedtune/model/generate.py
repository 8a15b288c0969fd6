"""What a language model answers: greedy, in batches, with a cache of keys and values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from itertools import groupby
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig

from fedtune import progress
from fedtune.errors import FedtuneError
from fedtune.model.encode import talked, unwatched
from fedtune.model.loss import autocast
from fedtune.model.template import THE_DATE
from fedtune.model.tunable import TunableModel


@dataclass(frozen=True)
class Question:
    """A prompt as tokens, with all that the template writes before an answer, and the answer wanted."""

    tokens: list[int]
    wanted: str


def questions(
    rows: Sequence[Mapping[str, Any]],
    tunable: TunableModel,
    template: str = "plain",
    system: str = "",
    day: date = THE_DATE,
) -> list[Question]:
    """The last answer of each row is what is asked for."""
    made = []
    marked = talked(list(enumerate(rows, 1)), tunable.base, template, system, day, Counter(), unwatched)
    for row, (ids, answered) in zip(rows, marked, strict=True):
        places = np.flatnonzero(answered)
        if not len(places):
            continue
        before = np.flatnonzero(~answered[: places[-1]])
        start = int(before[-1]) + 1 if len(before) else 0  # the last run of answered tokens
        made.append(Question(ids[:start], wanted_of(row)))
    return made


def wanted_of(row: Mapping[str, Any]) -> str:
    if "messages" not in row:
        return str(row["response"])
    said = [m["content"] or "" for m in row["messages"] if m["role"] == "assistant"]
    return str(said[-1])


def generated(tunable: TunableModel, asked: Sequence[Question], tokens: int, batch: int = 8) -> list[str]:
    """An answer of at most `tokens` tokens to each question. A prompt that leaves no room for them in the
    model's context loses its beginning."""
    tunable.check_live()
    room = prompt_room(tunable, tokens)
    said: dict[int, str] = {}
    tunable.net.eval()
    with torch.no_grad(), autocast(tunable, "off"):
        for numbers in batches(tunable, [len(one.tokens[-room:]) for one in asked], batch):
            prompts = [asked[n].tokens[-room:] for n in numbers]
            said |= dict(zip(numbers, answers(tunable, prompts, tokens), strict=True))
            progress.say("writing answers", len(said), len(asked))
    return [said[n] for n in range(len(asked))]


def batches(tunable: TunableModel, lengths: Sequence[int], batch: int) -> Iterator[list[int]]:
    """Numbers of prompts that are answered together, long ones first. Virtual tokens stand in front of the
    padding, whose length they would notice: behind them only prompts of one length go together."""
    virtual = bool(tunable.settings and tunable.settings.virtual_tokens)
    order = sorted(range(len(lengths)), key=lambda n: (-lengths[n], n))
    for _, group in groupby(order, key=lambda n: lengths[n] if virtual else 0):
        alike = list(group)
        yield from (alike[start : start + batch] for start in range(0, len(alike), batch))


def answers(tunable: TunableModel, prompts: Sequence[Sequence[int]], tokens: int) -> list[str]:
    """One batch, padded on the left."""
    tokenizer, device = tunable.base.tokenizer, tunable.base.device
    width = max(1, *map(len, prompts))
    ids = torch.full((len(prompts), width), tokenizer.pad_token_id)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        if len(prompt):
            ids[row, width - len(prompt) :] = torch.tensor(list(prompt))
            mask[row, width - len(prompt) :] = 1
    written = tunable.net.generate(
        input_ids=ids.to(device),
        attention_mask=mask.to(device),
        generation_config=GenerationConfig(
            do_sample=False,
            max_new_tokens=tokens,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=ends(tunable),
            use_cache="prompts" not in tunable.named,  # which enter in front of every call's tokens
        ),
    )
    return [tokenizer.decode(line[width:], skip_special_tokens=True).strip() for line in written]


def ends(tunable: TunableModel) -> list[int]:
    """Tokens that end an answer: the tokenizer's, and those that the model's own settings name."""
    stated = tunable.base.net.generation_config.eos_token_id
    known = stated if isinstance(stated, list) else [stated]
    return sorted({int(one) for one in (*known, tunable.base.tokenizer.eos_token_id) if one is not None})


def prompt_room(tunable: TunableModel, tokens: int) -> int:
    """Longest prompt. Raises D207 where answers alone fill the context."""
    context = tunable.base.context
    if context is None:
        return 1 << 20
    virtual = tunable.settings.virtual_tokens if tunable.settings else 0
    if tokens + virtual >= context:
        found = f"generate.tokens = {tokens} with a context of {context} tokens"
        raise FedtuneError("D207", found, "room for a prompt", "lower generate.tokens")
    return context - tokens - virtual

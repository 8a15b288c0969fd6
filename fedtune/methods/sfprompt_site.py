"""Loading what a party of a split run holds: a site the two ends, the body service the blocks between, and
nobody more than that.

The coordinator's run holds the whole model, to aggregate and to score. What it `told` travels in signed
tickets, so that a site knows
before any training that its ends, and the body behind the wire, are parts of the model that the coordinator
means.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from fedtune.hf.config import AUTO, load_config, locate
from fedtune.hf.labels import LabelSet
from fedtune.hf.pooling import choose_pooling, set_pooling
from fedtune.hf.tokenizer import fit_tokenizer, load_tokenizer
from fedtune.methods.sfprompt_settings import SFPromptSettings
from fedtune.model.base import (
    Base,
    context_of,
    dtype_of,
    reading,
    said_of,
)
from fedtune.model.device import pick_device, prepare_torch
from fedtune.model.fingerprint import tokenizer_text
from fedtune.model.fresh_head import redraw_head
from fedtune.model.settings import ModelSettings
from fedtune.model.tunable import TunableModel, without
from fedtune.split import selftest
from fedtune.split.anatomy import block_count
from fedtune.split.cut import Cut, Role
from fedtune.split.facts import SplitFacts
from fedtune.split.load import load_part
from fedtune.split.parts import Part


def describe(tunable: TunableModel) -> SplitFacts:
    """What a site must know of the coordinator's base: its fingerprint, the tokenizer's, and the card of its
    parts (JSON, about 6 KB)."""
    base = tunable.base
    with without(tunable):
        card = selftest.make(tunable.net.part)
    return SplitFacts(
        base.fingerprint,
        tokenizer_digest(base.tokenizer),
        json.dumps(card, sort_keys=True, separators=(",", ":")),
    )


def load_site(
    s: SFPromptSettings, model: ModelSettings, task: str, labels: Sequence[str], seed: int, told: SplitFacts
) -> Base:
    """Head and tail alone, checked against what the coordinator told, whose fingerprint the base takes over:
    nobody can compute it of a part.

    Raises S702 for parts or a tokenizer that are not the coordinator's, and what `fedtune.model.base.load`
    raises.
    """
    card = told.read_card()
    part, tokenizer, chosen = load(s, model, task, labels, seed, ("head", "tail"))
    selftest.check(part, card)
    if tokenizer_digest(tokenizer) != told.tokenizer:
        raise selftest.wrong(f"a tokenizer of digest {tokenizer_digest(tokenizer)[:12]}", told.tokenizer[:12])
    context = None if task == "image-classify" else context_of(part.net, tokenizer)
    base = Base(
        part.net,
        tokenizer,
        task,
        chosen.labels,
        part.device,
        model.name,
        context,
        part.fresh,
        said_of(chosen),
        kept_head=chosen.kept,
        pooling=part.pooling,
        part=part,
    )
    base.fingerprint = told.base
    return base


def load_body(s: SFPromptSettings, model: ModelSettings, task: str) -> Part:
    """The blocks between the cuts alone. Raises S701, S702, S704, M301."""
    return load(s, model, task, None, 0, ("body",))[0]


def load(
    s: SFPromptSettings,
    model: ModelSettings,
    task: str,
    labels: Sequence[str] | None,
    seed: int,
    holds: Sequence[Role],
) -> tuple[Part, Any, LabelSet]:
    """Some parts, for who has data the tokenizer, and the label set. `labels` None: whoever loads needs no
    task head."""
    prepare_torch(model)
    place = locate(model.name)
    known: dict[str, Any] = {"revision": model.revision} if model.revision else {}
    with reading(model.name):
        config, chosen = load_config(place, task, labels, known)
        tokenizer = load_tokenizer(place, task, known) if "head" in holds else None
        cut = Cut(s.head, block_count(config) - s.tail)
        where = {
            "dtype": dtype_of(model),
            "device": pick_device(model.device),
            "revision": model.revision or None,
        }
        part = load_part(place, AUTO[task], cut, holds, config=config, seed=seed, **where)
        part.pooling, _ = choose_pooling(model.pooling, place, task, chosen.kept, **known)
    set_pooling(part.net, part.pooling)
    if tokenizer is not None and task != "image-classify":
        fit_tokenizer(part.net, tokenizer, model.name)
    if not chosen.kept and "tail" in holds:
        part.fresh = redraw_head(part.net, part.fresh, seed)
    return part, tokenizer, chosen


def tokenizer_digest(tokenizer: Any) -> str:
    return hashlib.sha256(tokenizer_text(tokenizer).encode()).hexdigest()

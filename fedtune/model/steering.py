"""A big model that nobody has tuned, steered by a small one that was: emulated fine-tuning.

    logits = big + weight x (tuned small - base small)

(Mitchell et al. 2023, arXiv:2310.12962; proxy tuning, Liu et al. 2024, arXiv:2401.08565.) Experimental. Both
small ones are one network, with its adapter and without it: no third model is in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from transformers import LogitsProcessor, LogitsProcessorList

from fedtune.errors import FedtuneError
from fedtune.hf.config import locate
from fedtune.hf.tokenizer import load_tokenizer
from fedtune.model.base import Base, load, reading
from fedtune.model.collate import Example
from fedtune.model.fingerprint import tokenizer_parts
from fedtune.model.generate import Question, generated, prompt_room
from fedtune.model.loss import autocast, inputs_of
from fedtune.model.objectives.base import IGNORED
from fedtune.model.settings import ModelSettings
from fedtune.model.tunable import TunableModel, without
from fedtune.types import TOKEN_TASKS

MOST = 2.0  # weight up to which one is looked for
TEXTS, TOKENS = 8, 32  # texts, and predicted tokens of each, that a weight is found on
TEXT = ("input_ids", "labels")
HALVINGS = 20  # of the range of weights


@dataclass(eq=False)
class SteeredNet:
    """Called, and asked to generate, as the big network is."""

    big: Any
    small: TunableModel
    weight: float = 0.0

    def __call__(self, **arguments: Any) -> Any:
        said = self.big(**arguments)
        if self.weight == 0:
            return said
        tuned, base = both(self.small, arguments)
        return SimpleNamespace(logits=moved(said.logits, tuned - base, self.weight))

    def eval(self) -> SteeredNet:
        self.big.eval()
        self.small.net.eval()
        return self

    def generate(self, *, attention_mask: torch.Tensor, **how: Any) -> Any:
        small = self.small
        virtual = bool(small.settings and small.settings.virtual_tokens)
        tuned = Reader(small, small.net, attention_mask, caches=not virtual)
        base = Reader(small, small.base.net, attention_mask)
        steps = [Steps(small, self.weight, tuned, base)] if self.weight else []
        return self.big.generate(
            attention_mask=attention_mask, logits_processor=LogitsProcessorList(steps), **how
        )


@dataclass(eq=False)
class Steps(LogitsProcessor):  # type: ignore[misc]
    """The small model beside one `generate` of the big one: it reads each new token twice, with its adapter
    and without."""

    small: TunableModel
    weight: float
    tuned: Reader
    base: Reader

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        with autocast(self.small, "off"):
            tuned = self.tuned(input_ids)
            with without(self.small):
                base = self.base(input_ids)
        return moved(scores, tuned - base, self.weight)


@dataclass(eq=False)
class Reader:
    """A network beside one `generate`: it reads each new token, and keeps a cache of its own. Greedy only:
    rows must not change places.

    net     with the tunable model's adapter or without it
    mask    of the prompts
    caches  virtual tokens stand in front of every call's, so that with them each text is read anew
    """

    tunable: TunableModel
    net: Any
    mask: torch.Tensor
    caches: bool = True
    read: int = 0  # tokens that the cache holds
    past: Any = None

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        """(rows, vocabulary) logits of the token after the last."""
        rows, length = ids.shape
        mask = torch.cat([self.mask, self.mask.new_ones(rows, length - self.mask.shape[1])], 1)
        new = ids if self.past is None else ids[:, self.read :]
        known, more = signature(self.tunable.base.net.forward).parameters, dict[str, Any]()
        if not mask.all() and "position_ids" in known:  # padded on the left
            more["position_ids"] = (mask.cumsum(-1) - 1).clamp_min(0)[:, -new.shape[1] :]
        if "logits_to_keep" in known:
            more["logits_to_keep"] = 1
        if self.past is not None:
            more["past_key_values"] = self.past
        if self.caches or not self.tunable.in_cache:  # a prefix comes with a cache of its own
            more["use_cache"] = self.caches
        said = self.net(input_ids=new, attention_mask=mask, **more)
        if self.caches:
            self.past = getattr(said, "past_key_values", None)
        self.read = length
        logits: torch.Tensor = said.logits[:, -1]
        return logits.float()


def both(small: TunableModel, arguments: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 logits (texts, tokens, vocabulary) with the adapter and without it."""
    with autocast(small, "off"):
        tuned = small.net(**arguments).logits
        with without(small):
            base = small.base.net(**arguments).logits
    return tuned[:, -base.shape[1] :].float(), base.float()  # virtual tokens stand in front


def moved(logits: torch.Tensor, shift: torch.Tensor, weight: float) -> torch.Tensor:
    """Where tables of embeddings are padded to different heights, ids beyond the lower one stay as they are:
    no tokenizer writes them."""
    wide, width = logits.float(), min(logits.shape[-1], shift.shape[-1])
    return torch.cat([wide[..., :width] + weight * shift[..., :width], wide[..., width:]], -1)


def steered(small: TunableModel, name: str, weight: float) -> TunableModel:
    """The model at `name`, steered: what `score` and `generated` take. It is held in the number type and
    bits of the small one, reads no longer texts than that, and speaks by its tokenizer and chat template.

    Raises M306 where the task is no language model, M301 where nothing can be loaded, M303 for another
    vocabulary.
    """
    base = small.base
    refuse_task(base)
    with named_by_option():
        with reading(name):
            theirs = load_tokenizer(locate(name), base.task, {})
        refuse_other(base.tokenizer, theirs, name)
        big = load(like(base, name), base.task, (), 0)
    big.tokenizer, big.logits_apart = base.tokenizer, False  # the sum is not what one output layer says
    big.context = min((n for n in (big.context, base.context) if n is not None), default=None)
    made = TunableModel(big, small.settings, SteeredNet(big.net, small, weight), {}, [], small.total)
    big.attached = made if small.settings else None
    return made


def refuse_task(base: Base) -> None:
    """Raises M306."""
    if base.task not in TOKEN_TASKS:
        raise FedtuneError(
            "M306",
            f"--steer with a model of data.task = '{base.task}'",
            f"a language model ({' or '.join(TOKEN_TASKS)}), whose next token another can be steered to",
            "leave --steer out",
        )


def like(base: Base, name: str) -> ModelSettings:
    """Settings of another model that is held as this one is."""
    kinds = {str(value.dtype).removeprefix("torch.") for value in base.weights.values()}
    kind = next((kind for kind in ("bfloat16", "float16") if kind in kinds), "float32")
    held = {"dtype": kind, "device": str(base.device), "load": base.load}
    return ModelSettings.model_validate({"name": name, "threads": torch.get_num_threads(), **held})


@contextmanager
def named_by_option() -> Iterator[None]:
    """What is wrong with the model is mended where it was named."""
    try:
        yield
    except FedtuneError as error:
        if error.code != "M301":
            raise
        do = "correct --steer, or download the model where there is a network"
        raise FedtuneError(error.code, error.found, error.expected, do) from error


def refuse_other(mine: Any, theirs: Any, name: str) -> None:
    """Raises M303 where an id means another token, or where the same tokens are found in a text by other
    rules."""
    one, other = mine.get_vocab(), theirs.get_vocab()
    if one != other:
        token, _ = min(one.items() ^ other.items(), key=lambda item: (item[1], item[0]))
        ids = [vocabulary.get(token, "no token") for vocabulary in (other, one)]
        found, expected = f"token '{token}' as {ids[0]} in {name}", f"{ids[1]}, as in the small model"
    elif tokenizer_parts(mine) != tokenizer_parts(theirs):
        found, expected = f"a tokenizer of {name} that cuts texts otherwise", "that of the small model"
    else:
        return
    raise FedtuneError("M303", found, expected, "steer a model of the same family and vocabulary")


# --- the weight


def matched(model: TunableModel, texts: Sequence[Example]) -> float:
    """The weight at which the big model moves as far as the small one did: mean KL(steered, big) = mean
    KL(tuned, base) over predicted tokens of a few texts (for each token: dynamic logits fusion, Fan et al.
    2024, arXiv:2406.15480). No label is compared with anything. 0 to `MOST`. Raises D202 for no tokens.

    d/dw KL(steered, big) = w Var(shift) is never negative, so that halving finds it.
    """
    net, found = model.net.eval(), []
    with torch.no_grad():
        for text in texts[:TEXTS]:
            batch = {name: torch.from_numpy(np.asarray(text[name], np.int64))[None] for name in TEXT}
            batch["attention_mask"] = torch.ones_like(batch["input_ids"])
            arguments, labels = inputs_of(model, batch)
            at = (labels[0, 1:] != IGNORED).nonzero().flatten()[:TOKENS]
            with autocast(model, "off"):
                big = net.big(**arguments).logits
            found.append([logits[0, at].float() for logits in (big, *both(net.small, arguments))])
    if not sum(len(parts[0]) for parts in found):
        raise FedtuneError(
            "D202", "no text to find a weight of --steer on", "at least one", "give it: --steer-weight 1"
        )
    big, tuned, base = (torch.cat(parts) for parts in zip(*found, strict=True))
    wanted, shift = divergence(tuned, base), tuned - base
    low, high = 0.0, MOST
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if divergence(moved(big, shift, middle), big) < wanted:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def own_answers(model: TunableModel, asked: Sequence[Question]) -> list[Example]:
    """The first questions and what the tuned small model says to each, in the form of encoded texts; an end
    of text follows, so that there is something to predict where it says nothing."""
    small, room = model.net.small, prompt_room(model, TOKENS + 1)
    ends = [token for token in (small.base.tokenizer.eos_token_id,) if token is not None]
    made = list[Example]()
    for question, said in zip(asked, generated(small, asked[:TEXTS], TOKENS, TEXTS), strict=False):
        answer = small.base.tokenizer(said, add_special_tokens=False)["input_ids"][:TOKENS] + ends
        prompt = question.tokens[-room:]
        ids, labels = [*prompt, *answer], [*[IGNORED] * len(prompt), *answer]
        made.append({"input_ids": np.asarray(ids, np.int32), "labels": np.asarray(labels, np.int32)})
    return made


def divergence(one: torch.Tensor, other: torch.Tensor) -> float:
    """Mean KL in nats of the distributions (tokens, vocabulary) that logits stand for."""
    log_p, log_q = one.log_softmax(-1), other.log_softmax(-1)
    return float((log_p.exp() * (log_p - log_q)).sum(-1).double().mean())

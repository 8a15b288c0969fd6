"""What an update of a small batch tells of it, by known attacks on its gradients: which classes the rows
have, and which words they hold.

Whoever attacks knows the model before and after, and the vocabulary; nothing is drawn. `found` counts among
as many guesses as there is to find, so that guessing blindly finds the share `chance`.

    classes  a class that is there pulls its row of the head the other way than all others (iDLG, Zhao et al.
             2020, arXiv:2001.02610; LLG, Wainakh et al. 2022, arXiv:2105.09369)
    words    embeddings move where a word is there (Melis et al. 2019, arXiv:1805.04049); and a gradient of a
             matrix is a sum over tokens of what it read, so that the inputs of words that are there lie in
             the rows of what LoRA's A has moved by (DAGER, Petrov et al. 2024, arXiv:2405.15586)
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fedtune.model.encode import Encoded
from fedtune.model.tunable import TunableModel

Moved = Mapping[str, torch.Tensor]  # trained tensor -> after minus before
CHUNK = 2048  # words tried at once
PLACES = 8  # positions at which each is tried
LITTLE = 1e-6  # of the longest direction: what is shorter is rounding


@dataclass(frozen=True)
class Found:
    """how     the attack
    found   of `sought` classes or words that are there
    chance  the share of them that blind guesses find
    """

    how: str
    found: int
    sought: int
    chance: float


def classes_in(tunable: TunableModel, moved: Moved, data: Encoded) -> Found | None:
    """Classes of the rows, from the head's change; None without a head of classes that is trained."""
    if tunable.head not in moved:
        return None
    there = {int(one["labels"]) for one in data.examples}
    matrix = moved[tunable.head].double()
    bias = moved.get(tunable.head.removesuffix("weight") + "bias")
    if bias is not None and bool(bias.any()):
        pull = bias.double()
    else:  # most classes are not there, and move one way
        rows = matrix / matrix.norm(dim=1, keepdim=True).clamp(min=1e-30)
        pull = -(rows @ rows.sum(0))
    return best("the head's change", pull, there, set())


def words_in(tunable: TunableModel, moved: Moved, data: Encoded) -> Found | None:
    """Words of the rows, by the better attack that there is; None for images and for adapters whose change
    neither can read."""
    if tunable.base.tokenizer is None or not data or "input_ids" not in data.examples[0]:
        return None
    passed = set(tunable.base.tokenizer.all_special_ids)
    there = {int(word) for one in data.examples for word in one["input_ids"]} - passed
    table = tunable.base.net.get_input_embeddings().weight
    name = next((name for name, value in tunable.named.items() if value is table), "")
    if name in moved:
        return best("the embeddings' change", moved[name].double().norm(dim=1), there, passed)
    if factors := first_factors(tunable, moved):
        return best("what LoRA's A read", explained(tunable, moved, factors), there, passed)
    return None


def best(how: str, score: torch.Tensor, there: set[int], passed: set[int]) -> Found:
    """As many guesses as there is to find, by the highest scores; `passed` are no guesses."""
    score = score.clone()
    score[sorted(passed & set(range(len(score))))] = -torch.inf
    if not bool((score > -torch.inf).any()) or float(score.max()) == float(score[score > -torch.inf].min()):
        guesses: set[int] = set()  # nothing moved
    else:
        guesses = set(score.argsort(descending=True)[: len(there)].tolist())
    return Found(how, len(guesses & there), len(there), len(there) / max(len(score) - len(passed), 1))


def first_factors(tunable: TunableModel, moved: Moved) -> dict[str, torch.nn.Module]:
    """LoRA's A factors that read what the first one reads: those of the first block's projections."""
    by_id = {id(value): name for name, value in tunable.named.items() if name in moved}
    factors = {
        by_id[id(module.weight)]: module
        for module in tunable.net.modules()
        if isinstance(module, torch.nn.Linear)
        and id(module.weight) in by_id
        and by_id[id(module.weight)].endswith("lora_A.weight")
    }
    with reading(factors) as seen, torch.no_grad():
        ids = torch.tensor([[0, 0]], device=tunable.base.device)
        tunable.net.eval()(input_ids=ids, attention_mask=torch.ones_like(ids))
    first = next(iter(seen.values()), None)
    return {name: factors[name] for name, value in seen.items() if value is first}


def explained(tunable: TunableModel, moved: Moved, factors: Mapping[str, torch.nn.Module]) -> torch.Tensor:
    """(V,) the largest share of a word's input, less that of all words, that lies in the rows of what the
    factors have moved by; over the first positions."""
    rows = torch.cat([moved[name].double() for name in factors]).to(tunable.base.device)
    _, sizes, basis = torch.linalg.svd(rows, full_matrices=False)
    basis = basis[sizes > LITTLE * sizes.max().clamp(min=1e-30)]
    count = tunable.base.net.get_input_embeddings().weight.shape[0]
    if not bool(rows.any()):
        return torch.zeros(count)
    # twice through the words, so that memory does not grow with the vocabulary
    words = torch.arange(count).split(CHUNK)
    mean = sum(inputs_of_words(tunable, factors, some).sum(0) for some in words) / count  # (places, d)
    out = []
    for some in words:
        apart = inputs_of_words(tunable, factors, some) - mean
        inside = (apart @ basis.T).square().sum(-1)
        out.append((inside / apart.square().sum(-1).clamp(min=1e-30)).amax(1))
    return torch.cat(out).cpu()


def inputs_of_words(
    tunable: TunableModel, factors: Mapping[str, torch.nn.Module], words: torch.Tensor
) -> torch.Tensor:
    """(words, places, d) what the factors read where a text is one word over and over."""
    places = min(PLACES, tunable.base.context or PLACES)
    ids = words.to(tunable.base.device)[:, None].expand(-1, places)
    with reading(factors, stop=True) as seen, torch.no_grad(), suppress(Enough):
        tunable.net.eval()(input_ids=ids, attention_mask=torch.ones_like(ids))
    return next(iter(seen.values())).double()


class Enough(Exception):
    """The rest of a forward pass is of no interest."""


@contextmanager
def reading(factors: Mapping[str, torch.nn.Module], stop: bool = False) -> Any:
    """What each factor is given in the forward passes meanwhile; `stop`: a pass ends with the first."""
    seen: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: Any, args: tuple[torch.Tensor, ...]) -> None:
            seen[name] = args[0]
            if stop:
                raise Enough

        return hook

    handles = [module.register_forward_pre_hook(keep(name)) for name, module in factors.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def difference(after: Mapping[str, np.ndarray], before: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """What has moved, float64."""
    return {name: torch.from_numpy(after[name].astype(np.float64) - before[name]) for name in sorted(before)}

"""What a search finds in an update: texts whose gradient would move the trained numbers the same way (Zhu et
al. 2019, arXiv:1906.08935), by the cosine (Geiping et al. 2020, arXiv:2003.14053), on input embeddings, whose
nearest words are read (as LAMP, Balunovic et al. 2022, arXiv:2202.08827, without its language model).

Whoever attacks knows the model before and after, how long each text is, where its special tokens stand and
its class, which other attacks read. A walk's scalars are coordinates along known directions that are nearly
orthogonal: a gradient that agrees with the scalars points along the move that is made of them, so that one
attack is that on both. Several local steps are read as one, with the gradient halfway between before and
after, which of a short path is the mean one; at its start half of LoRA's factors have none.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy, normalize

from fedtune import progress
from fedtune.hf.eval_mode import in_eval_mode
from fedtune.model.encode import Encoded
from fedtune.model.loss import inputs_of
from fedtune.model.tunable import TunableModel
from fedtune.model.update_inversion import Found, Moved

RATE = 0.1  # of Adam, in standard deviations of an embedding's numbers; it falls to nothing
LONG = 0.1  # what a wrong mean length of the guess counts for, beside the cosine (LAMP's regulariser)
Cosine = Callable[[torch.Tensor, bool], torch.Tensor]  # of embeddings; whether to keep the graph
NEAR, SWEEPS = 16, 3  # words tried at a place, and how often all places are gone through
TRIES = 2  # starts, of which the one with the better match counts


@dataclass(frozen=True)
class Matched:
    """words  of the guess among those of the rows
    guess  cosine between the guess's gradient, as words, and what moved
    truth  the same of the rows themselves: where it is higher, a better search would find more; where it is
           near nothing, or lower, the update does not say which texts they were
    """

    words: Found
    guess: float
    truth: float


def match(
    tunable: TunableModel,
    moved: Moved,
    data: Encoded,
    steps: int,
    one_step: bool,
    sweeps: int = SWEEPS,
) -> Matched:
    """Search for the texts of `data`, whose words say nothing but what counts as found. The tunable model
    stands as it did before.

    steps     of gradient descent, TRIES times, each about four training steps on these rows; at most
              sweeps x NEAR passes for each token come after
    one_step  whether the update is of a single local step
    """
    device = tunable.base.device
    arguments, labels = inputs_of(tunable, data.collate(list(range(len(data)))))
    ids = arguments.pop("input_ids")
    table = tunable.base.net.get_input_embeddings().weight.detach().float()
    known = torch.tensor(sorted(tunable.base.tokenizer.all_special_ids), device=device)
    open_ = arguments.get("attention_mask", torch.ones_like(ids)).bool() & ~torch.isin(ids, known)
    ways = {name: value.to(device, torch.float32) for name, value in moved.items() if bool(value.any())}
    with standing_at(tunable, moved, 0.0 if one_step else 0.5), sdpa_kernel(SDPBackend.MATH):

        def cosine(embedded: torch.Tensor, again: bool) -> torch.Tensor:
            logits = tunable.net(inputs_embeds=embedded.to(table.dtype), **arguments).logits
            loss = cross_entropy(logits.float(), labels)
            found = torch.autograd.grad(
                loss, [tunable.named[name] for name in ways], create_graph=again, allow_unused=True
            )
            return along(found, list(ways.values()))

        best: tuple[float, torch.Tensor] | None = None
        for number in range(TRIES if ways else 0):
            draw = torch.Generator().manual_seed(number)
            start = torch.randn(*ids.shape, table.shape[1], generator=draw).to(device)
            guess = descended(cosine, start, table, table[ids], open_, steps)
            words, reached = settled(cosine, guess, table, known, ids, open_, sweeps)
            if best is None or reached > best[0]:
                best = reached, words
        truth = float(cosine(table[ids], False)) if ways else 0.0
    there, guesses = set(ids[open_].tolist()), set(best[1][open_].tolist()) if best else set()
    chance = len(there) / max(len(table) - len(known), 1)
    return Matched(
        Found("gradient matching", len(guesses & there), len(there), chance), best[0] if best else 0.0, truth
    )


def descended(
    cosine: Cosine,
    start: torch.Tensor,
    table: torch.Tensor,
    true: torch.Tensor,
    open_: torch.Tensor,
    steps: int,
) -> torch.Tensor:
    """(B, T, d) embeddings whose gradient lies along what moved, from `start` in standard deviations; special
    tokens and padding stay as they are."""
    spread, length = table.std(), table.norm(dim=1).mean()
    free = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([free], RATE)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for number in range(steps):
        progress.say("matching gradients", number + 1, steps)
        guess = torch.where(open_[..., None], free * spread, true)
        off = (guess[open_].norm(dim=1).mean() / length - 1).square()
        (free.grad,) = torch.autograd.grad(LONG * off - cosine(guess, True), free)
        optimizer.step()
        schedule.step()
    return (free * spread).detach()


def settled(
    cosine: Cosine,
    guess: torch.Tensor,
    table: torch.Tensor,
    known: torch.Tensor,
    ids: torch.Tensor,
    open_: torch.Tensor,
    sweeps: int,
) -> tuple[torch.Tensor, float]:
    """(B, T) words for embeddings, and the cosine that they reach: the nearest, and then, place by place and
    `sweeps` times at most, that one of the NEAR nearest by which the cosine grows most (as LAMP's discrete
    steps). Of `ids` the special tokens are read alone."""
    near = closest(guess, table, known)
    words = torch.where(open_, near[..., 0], ids)
    reached = float(cosine(table[words], False))
    for _ in range(sweeps):
        before = reached
        for row, place in open_.nonzero().tolist():
            for candidate in near[row, place]:
                other = words.clone()
                other[row, place] = candidate
                if (found := float(cosine(table[other], False))) > reached:
                    words, reached = other, found
        if reached == before:
            break
    return words, reached


def closest(guess: torch.Tensor, table: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
    """(B, T, NEAR) words by the cosine with their embeddings, the nearest first; special tokens are none."""
    near = normalize(guess, dim=-1) @ normalize(table, dim=-1).T
    near[..., known] = -torch.inf
    return near.topk(min(NEAR, len(table) - len(known))).indices


def along(found: Sequence[torch.Tensor | None], ways: list[torch.Tensor]) -> torch.Tensor:
    """The cosine between minus a gradient and what moved, over all tensors together."""
    pairs = [(one.float(), way) for one, way in zip(found, ways, strict=True) if one is not None]
    dot = sum((one * way).sum() for one, way in pairs)
    size = sum((one.square().sum() for one, _ in pairs), torch.zeros(())).clamp(min=1e-30).sqrt()
    return -dot / (size * sum(way.square().sum() for way in ways).clamp(min=1e-30).sqrt())


@contextmanager
def standing_at(tunable: TunableModel, moved: Mapping[str, torch.Tensor], share: float) -> Iterator[None]:
    """The tunable model in eval mode, so far along its move, and back."""
    before = {name: tunable.named[name].detach().clone() for name in moved}
    try:
        with torch.no_grad():
            for name, value in moved.items():
                tunable.named[name].add_(value.to(tunable.named[name]), alpha=share)
        with in_eval_mode(tunable.net):
            yield
    finally:
        with torch.no_grad():
            for name, value in before.items():
                tunable.named[name].copy_(value)


def seconds(tunable: TunableModel, data: Encoded, steps: int) -> float:
    """About how long a search takes here at most, by its first steps."""
    moved = {name: torch.ones_like(value) for name, value in tunable.named.items()}
    taken = []
    for few in (1, 3):
        began = time.perf_counter()
        match(tunable, moved, data, few, True, sweeps=0)
        taken.append(time.perf_counter() - began)
    each = max(taken[1] - taken[0], 0.0) / 2  # of TRIES steps, of about four passes each
    words = sum(data.length(row) for row in range(len(data)))
    return each * (steps + SWEEPS * NEAR * words / 4)

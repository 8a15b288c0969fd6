"""What whoever runs the body can read off the hidden states: two known attacks, on the user's own cut and
batch.

The server is honest but curious: it knows the frozen head (which is public), and where prompts enter at the
input, those too. Patches of pixels
are one linear map away from the first hidden state; deeper heads are inverted by gradient descent on their
input. Texts of a causal model are found
token by token, since a row depends on the tokens before it alone: the whole vocabulary is tried, and the
nearest answer kept (SipIt, arXiv
2510.15511, shows that hidden states tell texts apart).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from fedtune.errors import FedtuneError
from fedtune.split.parts import Part

Wire = Callable[[torch.Tensor], torch.Tensor]
CHUNK = 1024  # candidates tried at once
# of the squared length: half precision is off by 1e-7, eight bits by 1e-5, another token by far more
FITS = 1e-4


@dataclass(frozen=True)
class Leak:
    """attack     how
    recovered  share of the tokens found, or of the images with an error below 1 %
    error      mean squared error of the pixels over their variance; of the hidden states, for texts
    tried      tokens or images attacked
    """

    attack: str
    recovered: float
    error: float
    tried: int


def plain(hidden: torch.Tensor) -> torch.Tensor:
    return hidden


def attack(
    part: Part, inputs: Mapping[str, torch.Tensor], *, wire: Wire = plain, limit: int = 32, steps: int = 600
) -> Leak:
    """Attack one batch as it leaves the head. `wire` is what happens to a hidden state on its way (a codec,
    noise); `limit` tokens of each text.

    `steps` are of gradient descent, where that is the attack.
    """
    given = {name: value for name, value in inputs.items() if name != "labels"}
    with torch.no_grad():
        seen = wire(part.head(given)[0])
    if part.anatomy.image:
        pixels = given["pixel_values"]
        flat = part.cut.k == 0
        guess = (
            patches(part, seen, pixels.shape)
            if flat
            else descend(part, seen, torch.zeros_like(pixels), steps, "pixel_values")
        )
        errors = (guess - pixels).square().flatten(1).mean(1) / pixels.var()
        return Leak(
            "linear inversion" if flat else "gradient descent on pixels",
            float((errors < 1e-2).float().mean()),
            float(errors.mean()),
            len(pixels),
        )
    ids, mask = given["input_ids"], given.get("attention_mask", torch.ones_like(given["input_ids"])).bool()
    if part.place == 0:
        guess, name = search(part, seen, ids, mask, limit), "search of the vocabulary"
    else:
        guess, name = embeddings(part, seen, given, steps), "gradient descent on embeddings"
    looked = mask if part.place else mask & (mask.cumsum(1) <= limit)
    with torch.no_grad():
        again = part.head({**given, "input_ids": torch.where(looked, guess, ids)})[0]
    error = (again - seen)[looked].square().mean() / seen[looked].var()
    return Leak(name, float((guess == ids)[looked].float().mean()), float(error), int(looked.sum()))


def patches(part: Part, seen: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Pixels (B, C, H, W) from hidden states in front of the first block: what they are above those of a
    black image is a linear map of each patch."""
    projection = next(
        (
            m
            for path in part.anatomy.front
            for m in part.net.get_submodule(path).modules()
            if isinstance(m, torch.nn.Conv2d)
        ),
        None,
    )
    if projection is None:
        raise FedtuneError(
            "S701",
            f"no patch projection in a {type(part.net).__name__}",
            "a vision transformer",
            "choose k of 1 or more for this test",
        )
    batch, channels, height, width = shape
    tall, wide = projection.kernel_size
    with torch.no_grad():
        black = part.head({"pixel_values": seen.new_zeros(1, channels, height, width)})[0]
        rows = (height // tall) * (width // wide)
        above = (seen - black)[:, -rows:].double()
        flat = above @ torch.linalg.pinv(projection.weight.double().flatten(1)).T  # (B, patches, C tall wide)
    grid = flat.view(batch, height // tall, width // wide, channels, tall, wide).permute(0, 3, 1, 4, 2, 5)
    return grid.reshape(shape).to(seen.dtype)


def descend(
    part: Part,
    seen: torch.Tensor,
    start: torch.Tensor,
    steps: int,
    name: str,
    others: Mapping[str, torch.Tensor] | None = None,
) -> torch.Tensor:
    """The input whose hidden states come nearest, by Adam through the known head; the step shrinks to nothing
    over the last half."""
    guess = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([guess], 0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, 2 * (steps - step) / steps))
    for _ in range(steps):
        far = (part.head({**(others or {}), name: guess})[0] - seen).square().mean()
        (guess.grad,) = torch.autograd.grad(far, guess)
        optimizer.step()
        schedule.step()
    return guess.detach()


def search(part: Part, seen: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor, limit: int) -> torch.Tensor:
    """Token ids (B, T), found from left to right; what is not attacked stays 0. The true ids give the length
    alone.

    The vocabulary is tried in the order of how much an embedding points where the hidden state does, and no
    further once an answer fits.
    """
    table = part.net.get_input_embeddings().weight.detach()
    found = torch.zeros_like(ids)
    with torch.no_grad():
        for row in range(len(ids)):
            places = mask[row].nonzero().flatten()[:limit].tolist()
            before = ids.new_zeros(0)
            for place in places:
                target = seen[row, place]
                order = torch.cosine_similarity(table, target[None], dim=-1).argsort(descending=True)
                best, nearest = before, torch.inf
                for some in order.split(CHUNK):
                    far = distance(part, before, some, target)
                    if float(far.min()) < nearest:
                        best, nearest = some[far.argmin()][None], float(far.min())
                    if nearest < FITS * float(target.square().sum()):
                        break
                before = torch.cat([before, best])
            found[row, places] = before
    return found


def distance(part: Part, before: torch.Tensor, candidates: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """How far the last hidden state of `before` and each candidate (V,) is from the one seen (d,): (V,)."""
    texts = torch.cat([before.expand(len(candidates), -1), candidates[:, None]], 1)
    return (part.head({"input_ids": texts})[0][:, -1] - seen).square().sum(-1)


def embeddings(part: Part, seen: torch.Tensor, given: Mapping[str, torch.Tensor], steps: int) -> torch.Tensor:
    """Token ids (B, T) of an encoder, whose rows depend on all tokens: its input embeddings are found first,
    then the vocabulary's nearest."""
    table = part.net.get_input_embeddings().weight.detach()
    others = {name: value for name, value in given.items() if name != "input_ids"}
    start = table.mean(0).expand(*given["input_ids"].shape, -1)
    guess = descend(part, seen, start, steps, "inputs_embeds", others)
    return torch.cdist(guess.flatten(0, 1), table).argmin(-1).view(given["input_ids"].shape)

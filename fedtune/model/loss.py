"""The forward pass that training and scoring share: logits, and the summed cross entropy over what carries
loss."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from fedtune.errors import FedtuneError
from fedtune.hf.packing import arguments, rows_of_one_text
from fedtune.model.adapters.lora import Lora
from fedtune.model.blocks import is_encoder
from fedtune.model.encode import Encoded
from fedtune.model.loss_pieces import before_output, in_pieces, summed_in_pieces
from fedtune.model.objectives.base import IGNORED
from fedtune.model.packing import OWNERS, shown_in, way
from fedtune.model.tunable import TunableModel
from fedtune.types import LM_TASKS


def inputs_of(tunable: TunableModel, batch: dict[str, torch.Tensor]) -> tuple[dict[str, Any], torch.Tensor]:
    """The network's arguments on its device, and the labels, which stay out of it: each model would normalise
    its loss its own way."""
    shown = without_idle_mask(tunable, batch)
    moved = {name: value.to(tunable.base.device, non_blocking=True) for name, value in shown.items()}
    labels = moved.pop("labels")
    if labels.ndim == 3:  # pairs of responses: both are read as texts of their own
        moved = {name: value.flatten(0, 1) for name, value in moved.items()}
    if (owners := moved.pop(OWNERS, None)) is not None:
        dtype = next(iter(tunable.base.weights.values())).dtype
        moved |= arguments(owners, way(tunable.base), dtype)
    if tunable.base.task != "image-classify" and not is_encoder(tunable.base) and not tunable.in_cache:
        return moved | {
            "use_cache": False
        }, labels  # a cache is of no use here and costs memory; prefixes are one
    return moved, labels


def without_idle_mask(tunable: TunableModel, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A batch on the CPU without its mask where nothing is padded: on a GPU a model waits for the device to
    see that, in each forward pass. Virtual tokens are told from others by the mask, so it stays with them."""
    mask = batch.get("attention_mask")
    if mask is None or not mask.is_cpu or tunable.base.needs_mask:
        return batch
    if (tunable.settings and tunable.settings.virtual_tokens) or not bool(mask.all()):
        return batch
    return {name: value for name, value in batch.items() if name != "attention_mask"}


def summed_loss(
    tunable: TunableModel, batch: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """(sum of the cross entropy in float32, logits, aligned labels).

    Language models: logits (examples, tokens - 1, vocabulary) predict labels (examples, tokens - 1). Virtual
    tokens in front of the logits (peft's prompts) are cut off. Where the logits would be large there are
    none: the loss is summed in pieces.
    """
    arguments, labels = inputs_of(tunable, batch)
    if tunable.base.task in LM_TASKS and in_pieces(tunable.base, labels.numel()):
        hidden, aligned = hidden_of(tunable, arguments, labels)
        return summed_in_pieces(tunable.base.net, hidden, aligned), None, aligned
    logits, labels = logits_of(tunable, arguments, labels)
    return (
        cross_entropy(logits.reshape(-1, logits.shape[-1]).float(), labels.reshape(-1), reduction="sum"),
        logits,
        labels,
    )


def hidden_of(
    tunable: TunableModel, arguments: dict[str, Any], labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `logits_of` would make logits of, (texts, T - 1, width), and the labels."""
    with before_output(tunable.base.net):
        hidden = run(tunable.net, arguments).logits
    return hidden[:, -labels.shape[-1] : -1], labels[..., 1:]


def logits_of(
    tunable: TunableModel, arguments: dict[str, Any], labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and the labels that they predict: (B, C) and (B,), or (B, T - 1, C) and (B, T - 1), of pairs
    (B, 2, T - 1, C) and (B, 2, T - 1); `arguments` and `labels` as `inputs_of` makes them."""
    logits = run(tunable.net, arguments).logits
    if tunable.base.task in LM_TASKS:
        return logits[:, -labels.shape[-1] : -1].unflatten(0, labels.shape[:-1]), labels[..., 1:]
    return logits, labels


def run(net: Any, arguments: Mapping[str, Any]) -> Any:
    """What a network answers to `arguments` as `inputs_of` makes them: without a mask and positions, each
    row is one text."""
    single = not {"attention_mask", "position_ids"} & arguments.keys()
    with rows_of_one_text() if single else nullcontext():
        return net(**arguments)


def carries(task: str, batch: dict[str, torch.Tensor]) -> int:
    """How many terms a batch's loss sums over: predicted tokens, or examples; pairs, which are examples."""
    labels = batch["labels"]
    return int((labels[:, 1:] != IGNORED).sum()) if task in LM_TASKS and labels.ndim == 2 else len(labels)


def check_room(tunable: TunableModel, encoded: Encoded) -> None:
    """Virtual tokens take places of the context, except behind an encoder's embeddings, which have no
    positions. Raises D207."""
    base, s = tunable.base, tunable.settings
    if (
        s is None
        or base.context is None
        or not s.virtual_tokens
        or ("prompts" in tunable.named and is_encoder(base))
    ):
        return
    longest = max(encoded.length(i) for i in range(len(encoded)))
    if longest + s.virtual_tokens > base.context:
        found = f"{longest} tokens and {s.virtual_tokens} virtual ones (method.adapter.tokens)"
        raise FedtuneError(
            "D207",
            found,
            f"at most the model's context of {base.context} tokens",
            f"set data.max_length to {base.context - s.virtual_tokens} or less",
        )


def tokens_in(batch: dict[str, torch.Tensor]) -> int:
    """As `Encoded.tokens` counts: predicted tokens (language models), all tokens (classify), images."""
    if batch["labels"].ndim > 1:
        return int((batch["labels"][..., 1:] != IGNORED).sum())
    return int(shown_in(batch).sum()) if "input_ids" in batch else len(batch["labels"])


def autocast(tunable: TunableModel, wanted: str) -> torch.autocast:
    """Mixed precision: as asked, as CUDA has it, or because the base itself is stored in half precision
    (trained tensors never are)."""
    stored = next(iter(tunable.base.weights.values())).dtype
    device = tunable.base.device.type
    if stored in (torch.bfloat16, torch.float16):
        return torch.autocast(device, stored)
    fits = wanted == "bfloat16" or (
        wanted == "auto" and device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    )
    return torch.autocast(device, torch.bfloat16, enabled=fits)


@contextmanager
def uncast(tunable: TunableModel, wanted: str) -> Iterator[None]:
    """LoRA without peft's cast of every layer's input to the adapter's float32, where mixed precision casts
    it straight back: two kernels a layer and a copy of its input less, for the same bits. DoRA needs it."""
    from peft.helpers import disable_input_dtype_casting

    lora = tunable.settings
    idle = not isinstance(lora, Lora) or lora.dora or not autocast(tunable, wanted)._enabled
    with disable_input_dtype_casting(tunable.base.net, active=not idle):
        yield

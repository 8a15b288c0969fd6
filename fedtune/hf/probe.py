"""Tries a loaded text model once: padding must not matter, and a language model must not see what it should
predict."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from fedtune.errors import FedtuneError
from fedtune.hf.draws import own_draws
from fedtune.types import LM_TASKS

SHORT, LONG = "a b c", "a b c d e f g h a b c d e f g h"


def padding_side(net: Any, tokenizer: Any, task: str, context: int | None, name: str) -> str:
    """The side on which batches are padded, "right" or "left": the first on which a text scores the same
    alone and beside a longer one.

    Two texts of a few tokens, scored in eval mode; nothing is drawn and nothing changes. Raises M306 where
    neither side will do, and
    where a model for a language task changes what it says about a text's first tokens with its last one.
    """
    short, long = texts(tokenizer, context)
    lm = task in LM_TASKS
    slack = (
        1e-3 if next(net.parameters()).dtype == torch.float32 else 0.05
    )  # half precision rounds by 0.4 % at every layer
    with torch.no_grad():
        alone = said(net, [short], tokenizer.pad_token_id, "right")[0]
        if lm:
            changed = said(
                net, [[*short[:-1], other(short[-1], tokenizer)]], tokenizer.pad_token_id, "right"
            )[0]
            if differ(alone[: len(short) - 1], changed[: len(short) - 1], slack):
                raise FedtuneError(
                    "M306",
                    f"{name} ({type(net).__name__}), which sees tokens after the one that it should predict, "
                    f"with data.task = '{task}'",
                    "a causal language model",
                    "choose a decoder such as Llama, Qwen or GPT-2, or data.task = 'classify'",
                )
        for side in ("right", "left"):
            both = said(net, [short, long], tokenizer.pad_token_id, side)[0]
            mine = (
                both if not lm else both[: len(short)] if side == "right" else both[len(both) - len(short) :]
            )
            if not differ(alone if not lm else alone[: len(short)], mine, slack):
                return side
    raise FedtuneError(
        "M306",
        f"{name} ({type(net).__name__}), whose output for a text changes when a longer one is in the same "
        "batch",
        "a model that ignores padding (attention_mask, and the padding id of its configuration)",
        "choose another model",
    )


def is_causal(net: Any, tokenizer: Any, context: int | None) -> bool:
    """Whether the backbone computes a text's first token without its last one: a decoder, whatever its
    modules are called."""
    if getattr(net.config, "is_encoder_decoder", False):  # its encoder reads both ways
        return False
    short, _ = texts(tokenizer, context)
    device = next(net.parameters()).device
    ids = torch.tensor([short, [*short[:-1], other(short[-1], tokenizer)]], device=device)
    with torch.no_grad():
        hidden = net.base_model(input_ids=ids, attention_mask=torch.ones_like(ids))[0].float().cpu()
    return len(short) > 1 and not differ(hidden[0, 0], hidden[1, 0], 1e-3)


def needs_mask(net: Any, tokenizer: Any, context: int | None) -> bool:
    """Whether the model says anything else, or nothing at all, of two whole texts where no mask says that
    they are whole. Compared to the bit."""
    _, long = texts(tokenizer, context)
    ids = torch.tensor([long, long[::-1]], device=next(net.parameters()).device)
    with torch.no_grad():
        masked = net(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        try:
            return not torch.equal(masked, net(input_ids=ids).logits)
        except Exception:  # whatever a model says that cannot do without
            return True


def try_once(net: Any, base: Any) -> bool:
    """One forward pass of an input that is as small as possible, to see that what was put on the network
    runs. Raises what the network raises.

    True where the answer depends on anything that is to be trained.
    """
    inputs = smallest(net, base)
    device = next(iter(base.weights.values())).device
    dtype = next(iter(base.weights.values())).dtype
    half = (
        torch.autocast(device.type, dtype)
        if dtype != torch.float32 and device.type != "meta"
        else contextlib.nullcontext()
    )
    with torch.enable_grad(), own_draws(), half:
        return bool(net(**inputs).logits.requires_grad)


def smallest(net: Any, base: Any) -> dict[str, torch.Tensor]:
    """An input that is as small as possible, on the base's device: a text of a few tokens, an empty image."""
    device = next(iter(base.weights.values())).device
    if base.task == "image-classify":
        channels = getattr(net.config, "num_channels", None) or 3
        return {
            "pixel_values": torch.zeros(1, channels, *image_size(net.config, base.tokenizer), device=device)
        }
    short = texts(base.tokenizer, base.context)[0] if base.tokenizer is not None else [1, 2, 3]
    ids = torch.tensor([short], device=device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def image_size(config: Any, processor: Any) -> tuple[int, int]:
    """Height and width of the images that the model sees: the processor's, else the configuration's."""
    crop = getattr(processor, "crop_size", None) if getattr(processor, "do_center_crop", False) else None
    size = crop or getattr(processor, "size", None)
    if size and size.get("height") and size.get("width"):
        return int(size["height"]), int(size["width"])
    edge = (size or {}).get("shortest_edge") or getattr(config, "image_size", None) or 224
    return (int(edge[0]), int(edge[1])) if isinstance(edge, (list, tuple)) else (int(edge), int(edge))


def refuse_conflict(
    net: Any, tokenizer: Any, stated: int | None, task: str, context: int | None, name: str
) -> None:
    """Raises M303 where the model's file and its tokenizer name different padding ids, and the model reads
    another token because of it.

    Nobody but the model's author knows with which of the two it was trained.
    """
    config, own = net.config.get_text_config(), tokenizer.pad_token_id
    if (
        not isinstance(stated, int)
        or stated == own
        or not 0 <= stated < net.get_input_embeddings().weight.shape[0]
    ):
        return
    right = padding_side(net, tokenizer, task, context, name) == "right"
    config.pad_token_id = stated
    try:
        same = right and padding_side(net, tokenizer, task, context, name) == "right"
    except FedtuneError:
        same = False
    finally:
        config.pad_token_id = own
    if right and not same:
        raise FedtuneError(
            "M303",
            f"the padding id {stated} in config.json and {own} in the tokenizer of {name}, which classifies "
            "by the last token that is not padding",
            "the same padding id in both",
            "correct pad_token_id in config.json, or pad_token in tokenizer_config.json, to the id that the "
            "model was trained with",
        )


def texts(tokenizer: Any, context: int | None) -> tuple[list[int], list[int]]:
    """Ids of a short and of a longer text, with the tokenizer's own special tokens."""
    short, long = tokenizer(SHORT)["input_ids"], tokenizer(LONG)["input_ids"]
    if len(short) < 2 or len(long) <= len(short):  # a tokenizer without letters or special tokens
        first = next(iter(short or tokenizer.get_vocab().values()))
        short, long = [first] * 3, [first] * 9
    if context and len(long) > context:
        short, long = (
            (short[:1] + short[-1:], long[: context - 1] + long[-1:])
            if context > 2
            else (short[:1], long[:context])
        )
    return short, long


def other(token: int, tokenizer: Any) -> int:
    """Another token that is not a special one, where there is any."""
    ids = sorted({int(one) for one in tokenizer.get_vocab().values()} - {token})
    plain = [one for one in ids if one not in set(tokenizer.all_special_ids)]
    return (plain or ids)[0]


def said(net: Any, rows: list[list[int]], pad: int, side: str) -> torch.Tensor:
    """Logits of rows that are padded to the longest, on the CPU in float32."""
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        ids[number, place], mask[number, place] = torch.tensor(row), 1
    device = next(net.parameters()).device
    return net(input_ids=ids.to(device), attention_mask=mask.to(device)).logits.float().cpu()


def differ(one: torch.Tensor, two: torch.Tensor, slack: float) -> bool:
    """Whether two results differ by more than the arithmetic of a batch explains."""
    return bool(one.numel() and (one - two).abs().max() > slack * float(one.abs().max()) + 1e-5)

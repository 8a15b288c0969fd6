"""How the states of a text's tokens become one vector for the task head: as the model's class does it, or as
the encoder was trained.

A sentence encoder was trained under one pooling, most often the mean; its stock classifier reads another, the
first token through a pooler
that was never trained. On all-MiniLM-L6-v2 that vector is nearly constant, and a head learns little from it.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any, Literal

import torch

from fedtune.errors import FedtuneError
from fedtune.types import LM_TASKS

Pooling = Literal["own", "mean", "cls", "last"]  # own: whatever the model's class does
STATED: dict[str, Pooling] = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_lasttoken": "last",
}


def trained_pooling(place: str | Path, **known: Any) -> str:
    """What a sentence-encoder folder (or hub name) says of its pooling, "" where it says nothing; a mode that
    is not here is returned as it is called."""
    from transformers.utils import cached_file

    quiet = {
        "_raise_exceptions_for_gated_repo": False,
        "_raise_exceptions_for_missing_entries": False,
        "_raise_exceptions_for_connection_errors": False,
    }
    found = cached_file(str(place), "1_Pooling/config.json", **known, **quiet)
    if found is None:
        return ""
    try:
        stated = json.loads(Path(found).read_text(encoding="utf-8"))
        modes = [name for name, on in stated.items() if name.startswith("pooling_mode_") and on is True]
    except (OSError, ValueError, AttributeError) as error:
        raise FedtuneError(
            "M301",
            f"'{found}' ({str(error)[:120]})",
            "the pooling of a sentence encoder",
            "get the model again, or set model.pooling",
        ) from error
    if isinstance(stated.get("pooling_mode"), str):  # newer files name it
        return (
            str(stated["pooling_mode"])
            .removesuffix("_tokens")
            .removesuffix("_token")
            .replace("lasttoken", "last")
        )
    return (
        STATED.get(modes[0], modes[0].removeprefix("pooling_mode_"))
        if len(modes) == 1
        else "+".join(sorted(modes))
    )


def choose_pooling(
    wanted: str, place: str | Path, task: str, kept_head: bool, **known: Any
) -> tuple[Pooling, str]:
    """The pooling to use, and what to say of it. `kept_head`: the task head came trained from the file, with
    the pooling of its class.

    Raises M306 for a pooling that is asked for where nothing is pooled.
    """
    if task in LM_TASKS:
        if wanted not in ("auto", "pooler"):
            raise FedtuneError(
                "M306",
                f"model.pooling = '{wanted}' with data.task = '{task}'",
                "auto: a language model pools nothing",
                "remove it",
            )
        return "own", ""
    if wanted == "pooler":
        return "own", ""
    if wanted != "auto":
        return wanted, f"pooling: {wanted}, as model.pooling says"  # type: ignore[return-value]
    trained = "" if kept_head or task != "classify" else trained_pooling(place, **known)
    if trained in ("mean", "cls", "last"):
        return trained, f"pooling: {trained}, as the encoder was trained (1_Pooling/config.json)"  # type: ignore[return-value]
    if trained:
        return (
            "own",
            f"pooling: the model's own; '{trained}' of 1_Pooling/config.json is not one of mean, cls, last",
        )
    return "own", ""


def stated(pooling: str) -> str:
    """The value of model.pooling that gives this pooling again, whatever lies beside the model."""
    return "pooler" if pooling == "own" else pooling


def set_pooling(net: Any, mode: Pooling) -> None:
    """Let every head of the network read one vector of a text or image, whichever of its places it looks at.
    Raises M306 for states that are no sequence.

    The backbone's last states (B, T, d) become that vector at all T places, and so does what its pooler said.
    Prompts between
    the blocks are left out; virtual tokens that peft puts before a text are tokens like others.
    """
    if mode == "own":
        return
    backbone = net.base_model
    names = list(inspect.signature(backbone.forward).parameters)
    place = names.index("attention_mask") if "attention_mask" in names else None

    def pool(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        hidden = output.last_hidden_state
        if hidden.ndim != 3:
            found = (
                f"model.pooling = '{mode}' with a {type(net).__name__}, whose last states have {hidden.ndim} "
                "dimensions"
            )
            raise FedtuneError("M306", found, "a transformer", "set model.pooling = 'pooler'")
        mask = kwargs.get("attention_mask", args[place] if place is not None and len(args) > place else None)
        vector = pooled(hidden, mask, mode)
        output.last_hidden_state = vector[:, None].expand_as(hidden)
        if output.get("pooler_output") is not None:
            output.pooler_output = vector
        return output

    backbone.register_forward_hook(pool, with_kwargs=True)


def pooled(hidden: torch.Tensor, mask: torch.Tensor | None, mode: Pooling) -> torch.Tensor:
    """(B, T, d), mask (B, T) or None -> (B, d)."""
    if mask is None or mask.ndim != 2:
        mask = hidden.new_ones(hidden.shape[:2])
    if mode == "cls":
        return hidden[
            torch.arange(len(hidden), device=hidden.device), mask.to(torch.int32).argmax(1)
        ]  # the first that is not padding
    if mode == "last":
        places = torch.arange(mask.shape[1], device=hidden.device) * (mask > 0)
        return hidden[torch.arange(len(hidden), device=hidden.device), places.argmax(1)]
    weights = mask[:, :, None].to(torch.float32)
    return ((hidden.float() * weights).sum(1) / weights.sum(1).clamp(min=1e-9)).to(hidden.dtype)

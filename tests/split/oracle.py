"""The whole model with prompts, in one autograd graph, without anything of fedtune.split: what a split run
must equal."""

from __future__ import annotations

from typing import Any

import torch

from tests.split.families import FAMILIES


def block_list(net: Any) -> Any:
    return next(
        m
        for m in net.base_model.modules()
        if isinstance(m, torch.nn.ModuleList) and len(m) == net.config.num_hidden_layers
    )


def put_in(hidden: torch.Tensor, prompts: torch.Tensor, place: int) -> torch.Tensor:
    return torch.cat([hidden[:, :place], prompts.expand(len(hidden), -1, -1), hidden[:, place:]], 1)


def longer(name: str, batch: dict[str, torch.Tensor], count: int) -> dict[str, torch.Tensor]:
    """Mask and labels of a batch with `count` prompts."""
    place = int(FAMILIES[name][0] in ("text", "image"))
    out = dict(batch)
    if "attention_mask" in batch:
        mask = batch["attention_mask"]
        out["attention_mask"] = torch.cat(
            [mask[:, :place], mask.new_ones(len(mask), count), mask[:, place:]], 1
        )
    if FAMILIES[name][0] == "lm":
        out["labels"] = torch.cat(
            [batch["labels"].new_full((len(batch["labels"]), count), -100), batch["labels"]], 1
        )
    return out


def at_input(
    name: str, net: Any, batch: dict[str, torch.Tensor], prompts: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss, logits) with prompts in front of the text's embeddings, or behind the class token's."""
    kind, full = FAMILIES[name][0], longer(name, batch, len(prompts))
    if kind in ("lm", "last"):
        embeddings = net.get_input_embeddings()(full.pop("input_ids"))
        full["inputs_embeds"] = put_in(embeddings, prompts, 0)
        if kind == "lm":
            output = net(**full)
            return output.loss, output.logits
        labels, last = full.pop("labels"), full["attention_mask"].sum(1) - 1
        logits = net.score(net.base_model(**full).last_hidden_state)[torch.arange(len(last)), last]
        return torch.nn.functional.cross_entropy(logits, labels), logits
    if name == "modernbert":
        full["position_ids"] = torch.arange(batch["input_ids"].shape[1] + len(prompts))[None]
    hook = net.base_model.embeddings.register_forward_hook(
        lambda module, args, output: put_in(output, prompts, 1)
    )
    try:
        output = net(**full)
    finally:
        hook.remove()
    return output.loss, output.logits


def at_cut(
    name: str, net: Any, batch: dict[str, torch.Tensor], prompts: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss, logits) with prompts in front of block k: a run over the text gives what enters that block, a
    second run, longer, goes on from there."""
    kind, full = FAMILIES[name][0], longer(name, batch, len(prompts))
    place, count, blocks = int(kind in ("text", "image")), len(prompts), block_list(net)
    seen: list[torch.Tensor] = []

    def note(module: Any, args: Any, named: Any) -> None:
        seen.append(args[0] if args else named["hidden_states"])

    hook = blocks[k].register_forward_pre_hook(note, with_kwargs=True)
    net(**{key: value for key, value in batch.items() if key != "labels"})
    hook.remove()

    def swap(module: Any, args: Any, named: Any) -> Any:
        hidden = put_in(seen[0], prompts, place)
        return ((hidden, *args[1:]), named) if args else (args, {**named, "hidden_states": hidden})

    if kind == "image":  # the second run's embeddings are lengthened with rubbish; they are not used
        base = net.base_model.embeddings.register_forward_hook(
            lambda m, a, o: (
                put_in(o, prompts.detach(), place)
                if not isinstance(o, tuple)
                else (put_in(o[0], prompts.detach(), place), *o[1:])
            )
        )
    else:
        rubbish = full["input_ids"].new_full((len(full["input_ids"]), count), 3)
        full["input_ids"] = torch.cat(
            [full["input_ids"][:, :place], rubbish, full["input_ids"][:, place:]], 1
        )
    hook = blocks[k].register_forward_pre_hook(swap, with_kwargs=True)
    try:
        output = net(**full)
    finally:
        hook.remove()
        if kind == "image":
            base.remove()
    return output.loss, output.logits

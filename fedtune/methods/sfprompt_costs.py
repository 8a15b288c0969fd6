"""What a recipe's cut costs, by formula, from the model's config.json alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fedtune.methods.sfprompt_net import SplitNet, cut_bench, stated_rows
from fedtune.methods.sfprompt_settings import SFPromptSettings
from fedtune.model.adapters import Lora
from fedtune.model.memory_plan import plan, weightless
from fedtune.model.split_tunable import blank_image, check_context
from fedtune.model.tunable import TunableModel
from fedtune.split.costs import Costs, Mode, costs

NUMBER_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1}


def client_bytes(tunable: TunableModel) -> int:
    """The frozen values of head and tail in memory, those that both hold once."""
    part = tunable.net.part
    values = {id(value): value for role in ("head", "tail") for value in part.parameters(role).values()}
    trained = {id(value) for value in tunable.named.values()}
    return sum(value.numel() * value.element_size() for key, value in values.items() if key not in trained)


def remarks(s: SFPromptSettings, recipe: Any, labels: int, rows: float) -> list[str]:
    """Lines for `fedtune check`. Raises D207 where the longest text leaves no room for the prompts."""
    base = weightless(recipe.model, recipe.data.task, labels)
    tunable = cut_bench(base, s, 0)
    part, batch = tunable.net.part, s.train.batch
    if part.place == 0:
        check_context(
            recipe.data.max_length,
            s.prompts,
            getattr(base.net.config.get_text_config(), "max_position_embeddings", None),
        )
    tokens = part.head(blank_image(base))[0].shape[1] if part.anatomy.image else recipe.data.max_length
    way, cost = at_cut(s, tunable.net, tokens)
    kept = max(1, round(rows * s.keep))
    micro = s.train.steps * s.train.accumulate if s.train.steps else s.train.epochs * -(-kept // batch)
    lora = plan(recipe.model, Lora(), recipe.data.task, labels).trainable
    own, other = 8 * tunable.trainable, 8 * lora
    scales = ", and 6 % for int8's scales" if s.codec == "int8" else ""
    once = f", once {cost.once:,} an example" if cost.once else ""
    return [
        f"client    holds {100 * cost.share_parameters:.2f} % of the parameters (head and tail)",
        f"client    does {100 * cost.share_flops:.2f} % of full fine-tuning's FLOPs",
        f"cut       {way}: a micro-batch of {batch} x {tokens} tokens up {cost.up:,}, down {cost.down:,} "
        f"bytes{once}{scales}",
        f"cut       a client's round of {micro} micro-batches: "
        f"{through(cost, micro, min(kept, micro * batch)):,} bytes by formula (training alone)",
        f"cut       costs as much as fedpeft with rank 8 at {cost.break_even(batch, other, own):,.0f} "
        "examples a round",
    ]


def at_cut(s: SFPromptSettings, net: SplitNet, tokens: int) -> tuple[str, Costs]:
    """How examples of so many tokens go through the cut, in a word, and what that costs."""
    batch, number, width = s.train.batch, NUMBER_BYTES[s.codec], net.part.width
    mode: Mode = "naive" if not net.lean else "cached" if s.cache_smashed else "slim"
    cost = costs(
        type(net.base.net),
        net.base.net.config,
        net.part.cut,
        tokens=tokens,
        batch=batch,
        prompts=s.prompts,
        position="input" if s.head_learns else s.position,
        mode=mode,
        number=number,
        kind=stated_rows(net.base) if net.base.pooling != "own" else None,
    )
    way: str = mode
    if (
        not net.lean and net.kind != "all"
    ):  # whole hidden states in front of the body, the tail's rows alone behind it
        rows = batch * (tokens if net.kind == "each" else 1)
        each = (batch * (tokens + s.prompts) + rows) * width * number
        way, cost = "slim behind the body", replace(cost, up=each, down=each)
    if not s.prompts and not s.head_learns:  # nothing in front of the body learns, so nothing goes back
        hidden = batch * tokens * width * number
        cost = replace(
            cost, up=0 if mode == "cached" else hidden, down=cost.down if net.lean else cost.down - hidden
        )
    return way, cost


def through(cost: Costs, micro: int, samples: int) -> int:
    """Bytes of a client's first round."""
    return micro * (cost.up + cost.down) + samples * cost.once

"""What a recipe would do, before anything runs: clients, bytes, memory, exposure. No weights are read or downloaded."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from fedtune import methods, transforms
from fedtune.config import Recipe
from fedtune.data import Federation, histogram, load
from fedtune.errors import FedtuneError
from fedtune.runtime.exposure import Exposure, exposure
from fedtune.runtime.sampling import sample
from fedtune.schema import Schema
from fedtune.transforms.broadcast import down_bits
from fedtune.types import Update
from fedtune.wire import EVERYONE, Header, encode, encode_state

if TYPE_CHECKING:
    from fedtune.model.shapes import Plan

MIB = 2**20


@dataclass(frozen=True)
class Checked:
    """The answers of `fedtune check`, for people and programs."""

    recipe: Recipe
    federation: Federation
    plan: Plan
    asked: int  # clients per round
    up_bytes: int  # per client and round, header included; with a chain, by its own estimate
    down_bytes: int
    bits: tuple[float, float]  # a trained parameter, up and down, headers left out
    memory: dict[str, int]  # what -> bytes
    exposed: list[Exposure]


def check(recipe: Recipe) -> Checked:
    """Raises the first mistake that can be found without the weights."""
    federation = load(recipe.data, recipe.partition, recipe.seed)
    from fedtune.model.shapes import plan as plan_of

    plan = plan_of(recipe.model, recipe.method.adapter, recipe.data.task, len(federation.labels))
    method, chain = methods.build(recipe.method, recipe.rounds), transforms.build(recipe.chain)
    schema = Schema(tuple(sorted(plan.shapes.items())))
    bits, (whole, change) = transforms.bits_per_parameter(chain, schema), down_bits(recipe.downlink, schema)
    asked = len(sample(recipe.sampling, len(federation.clients), recipe.seed, 1))
    down = change if asked == len(federation.clients) else whole  # who sat out a round does not hold the broadcast before
    if plan.context is not None and recipe.data.max_length > plan.context and recipe.data.task != "image-classify":
        raise FedtuneError("D207", f"data.max_length = {recipe.data.max_length}", f"at most the model's context, {plan.context}", "lower data.max_length")
    return Checked(recipe, federation, plan, asked, *message_bytes(schema, bits, down), (bits, down), memory(recipe, plan), exposure(method, chain))


def message_bytes(schema: Schema, bits: float, down_bits: float) -> tuple[int, int]:
    """Bytes of one answer and of one broadcast, measured on real messages of zeros; codes by their own estimate of bits a value."""
    header = Header(run="0" * 16, base="0" * 64, round=1, client=1, verb="train", schema=schema.fingerprint)
    zeros = {name: np.zeros(shape, np.float32) for name, shape in schema.entries}
    up = len(encode(Update.of(zeros, 1.0, {"loss": 1.0}), header))
    down = len(encode_state(zeros, replace(header, client=EVERYONE)))
    return round(up - (32 - bits) * schema.count / 8), round(down - (32 - down_bits) * schema.count / 8)


def memory(recipe: Recipe, plan: Plan) -> dict[str, int]:
    """Bytes of one client at work. Activations: Korthikanti et al. 2022, eq. 1, scaled from 16 to 32 bits."""
    train = recipe.method.train
    moments = 2 if train.optimizer == "adamw" else 1 if train.momentum else 0
    length, batch = recipe.data.max_length, train.batch
    wide = 2 if recipe.model.dtype == "float32" else 1
    return {
        "base model": plan.weights_bytes,
        "trained tensors, gradients, optimiser": 4 * plan.trainable * (2 + moments),
        "activations (estimate)": wide * batch * length * plan.layers * (34 * plan.hidden + 5 * plan.heads * length),
    }


def rows(checked: Checked) -> list[str]:
    """The report as lines of text."""
    recipe, federation, plan = checked.recipe, checked.federation, checked.plan
    whole = checked.asked * recipe.rounds * (checked.up_bytes + checked.down_bytes)
    lines = [
        f"recipe    {recipe.method.type} / {recipe.method.adapter.kind} on {recipe.model.name}, {recipe.data.task}, {recipe.rounds} rounds, seed {recipe.seed}"
    ]
    lines.append(f"trained   {plan.trainable:,} of {plan.total:,} parameters ({100 * plan.trainable / plan.total:.3f} %)")
    lines.append(f"clients   {len(federation.clients)}, {checked.asked} asked per round; test set {len(federation.test)} rows")
    for client in federation.clients:
        counts = histogram(client.train)
        labels = "  ".join(f"{label}:{n}" for label, n in list(counts.items())[:12]) + (" ..." if len(counts) > 12 else "")
        lines.append(f"  {client.name:<24}{len(client.train):>7} rows, {len(client.test)} held out  {labels}")
    lines += [f"left out  {count} rows: {reason}" for reason, count in federation.dropped.items()]
    lines.append(f"bytes     per client and round: up {checked.up_bytes:,}, down {checked.down_bytes:,}; whole run {whole / MIB:,.1f} MiB")
    lines.append(f"bits      a trained parameter: up {checked.bits[0]:.3f}, down {checked.bits[1]:.3f}" + (" (estimates)" if recipe.chain else ""))
    lines += [f"memory    {what}: {count / MIB:,.1f} MiB" for what, count in checked.memory.items()]
    for row in checked.exposed:
        lines.append(
            f"server    verb '{row.verb}': sees {row.sees}" + (f"; through {' > '.join(row.through)}" if row.through else "; as sent, no step in the chain")
        )
    return lines

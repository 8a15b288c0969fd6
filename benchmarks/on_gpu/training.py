"""Local steps with gradients, and scores: what fedtune's loops cost beside plain ones that compute the same.

A LoRA step takes at most 1.05 times as long as a plain peft loop's and no more memory. Eight clients with one text of
32 tokens a step are trained together at least four times as fast as one after the other, on a model of 0.6 B
parameters. Scoring takes at most 1.05 times as long as plain forward passes."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import torch
from claims import at_least, at_most, claim
from llm import ours, theirs

from fedtune.model.adapters import Lora
from fedtune.model.base import Base
from fedtune.model.encode import Encoded
from fedtune.model.fit import fit
from fedtune.model.loss import autocast, inputs_of
from fedtune.model.objectives import CrossEntropy
from fedtune.model.score import score
from fedtune.model.settings import TrainSettings
from fedtune.model.together import Trainee, fit_together
from fedtune.model.training_loss import TrainingLoss
from fedtune.model.tunable import TunableModel, attach, detach
from on_gpu.models import apart, base_of, data_of, operations, peak, seconds

Claims = Iterator[dict[str, object]]
LORA = Lora(rank=16, alpha=32.0)
# a step's gradients by two ways whose sums differ in order: of bfloat16 products, and of float32
CLOSE = 0.02
STEPS = 4
CLIENTS = 8


def lora(device: torch.device, tiny: bool) -> Claims:
    for size, batch, tokens in (
        [("tiny", 2, 8)] if tiny else [("0.6B", 8, 128), ("0.6B", 8, 1024), ("1B", 8, 512)]
    ):
        base = base_of(size, device)
        data = data_of(base, batch * STEPS, tokens)
        what = f"LoRA on {size}, {batch} x {tokens}"
        yield gradients(what, base, data, batch)
        settings = TrainSettings(optimizer="adamw", lr=1e-4, clip=1.0, batch=batch, steps=STEPS)
        taken, bytes_held, asked = [], [], []
        for way in (ours, theirs):
            run, undo = way(base, data, settings)
            bytes_held.append(peak(run, device))
            asked.append(operations(run) / STEPS)
            taken.append(seconds(run, device, 3) / STEPS)
            undo()
        print(
            f"{what}: {1e3 * taken[0]:.1f} ms a step, plain peft {1e3 * taken[1]:.1f}; "
            f"peak {bytes_held[0] / 2**30:.2f} and {bytes_held[1] / 2**30:.2f} GiB"
        )
        yield at_most(f"seconds of a step, {what}; other: a plain peft loop", *taken, 1.05)
        yield at_most(f"operations of a step, {what}; other: a plain peft loop", *asked, 1.0)
        if device.type == "cuda":
            yield at_most(f"bytes at once, {what}; other: a plain peft loop", *map(float, bytes_held), 1.0)


def gradients(what: str, base: Base, data: Encoded, batch: int) -> dict[str, object]:
    """Of fedtune's loss and of the model's own, at an adapter that says something."""
    tunable = attach(base, LORA, 1)
    generator = torch.Generator().manual_seed(1)
    for value in tunable.named.values():
        value.data += 0.02 * torch.randn(value.shape, generator=generator).to(value.device)
    rows, found = data.collate(range(batch)), []
    terms = (rows["labels"][:, 1:] != -100).sum()
    for way in ("fedtune", "plain"):
        with autocast(tunable, "auto"):
            if way == "fedtune":
                loss = TrainingLoss.of(CrossEntropy(), tunable, data)(tunable, dict(rows)) / terms
            else:
                given = {name: value.to(base.device) for name, value in rows.items()}
                loss = tunable.net(**given, use_cache=False).loss
        found.append(list(torch.autograd.grad(loss, tunable.parameters())))
    detach(tunable)
    wrong = apart(*found)
    return claim(
        f"gradients of a step, {what}: difference", wrong, CLOSE, wrong / CLOSE, f"<= {CLOSE}", wrong <= CLOSE
    )


def together(device: torch.device, tiny: bool) -> Claims:
    base = base_of("tiny" if tiny else "0.6B", device)
    tunable, settings = attach(base, LORA, 1), TrainSettings(optimizer="adamw", lr=1e-4, batch=1, steps=STEPS)
    base.tokenizer = SimpleNamespace(pad_token_id=0)  # all that is asked of it from here on
    start = tunable.read()
    trainees = [
        Trainee(data_of(base, STEPS, 8 if tiny else 32, seed), start, seed)
        for seed in range(2 if tiny else CLIENTS)
    ]

    def alone() -> list[list[torch.Tensor]]:
        return [trained_alone(tunable, one, settings) for one in trainees]

    def at_once() -> list[list[torch.Tensor]]:
        said = fit_together(tunable, trainees, settings, frozenset(tunable.named))
        return [list(map(torch.from_numpy, values.values())) for _, values in said]  # type: ignore[misc]

    moved = [
        [
            [value - torch.from_numpy(first) for value, first in zip(one, start.values(), strict=True)]
            for one in way()
        ]
        for way in (at_once, alone)
    ]
    wrong = max(apart(one, other) for one, other in zip(*moved, strict=True))
    text = f"moves of {len(trainees)} clients trained in one pass: difference from each alone"
    yield claim(
        text, wrong, 0.1, wrong / 0.1, "<= 0.1", wrong <= 0.1
    )  # AdamW makes whole steps of small gradients
    found, other = seconds(at_once, device, 3), seconds(alone, device, 3)
    print(f"{len(trainees)} clients, {STEPS} steps of one text: together {found:.2f} s, alone {other:.2f}")
    yield at_least(
        f"seconds of {len(trainees)} clients in one pass; other: one after the other", found, other, 4.0
    )


def trained_alone(tunable: TunableModel, one: Trainee, settings: TrainSettings) -> list[torch.Tensor]:
    tunable.write(one.start)
    fit(tunable, one.encoded, settings, one.seed)
    return [torch.from_numpy(value) for value in tunable.read().values()]


def scoring(device: torch.device, tiny: bool) -> Claims:
    base = base_of("tiny" if tiny else "0.6B", device)
    tunable, rows, tokens = attach(base, LORA, 1), *((8, 8) if tiny else (64, 512))
    data = data_of(base, rows, tokens)

    def plain() -> float:
        """The model's own loss, eight rows at a time: all logits at once would not fit."""
        total = 0.0
        with torch.inference_mode():
            for first in range(0, rows, 8):
                arguments, labels = inputs_of(tunable, data.collate(range(first, min(first + 8, rows))))
                total += float(tunable.net(**arguments, labels=labels).loss) * len(labels)
        return total / rows

    wrong = abs(score(tunable, data).loss - plain()) / plain()
    yield claim(
        "loss of a score, difference from the model's own",
        wrong,
        1e-3,
        wrong / 1e-3,
        "<= 0.001",
        wrong <= 1e-3,
    )
    found, other = seconds(lambda: score(tunable, data), device, 3), seconds(plain, device, 3)
    print(f"{rows} x {tokens} tokens scored in {found:.3f} s, plain passes {other:.3f}")
    yield at_most("seconds of scoring; other: plain forward passes", found, other, 1.05)

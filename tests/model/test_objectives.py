"""Every loss equals its formula, written again in numpy; its gradient is a numerical one; what weighs nothing
changes no bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedtune.errors import FedtuneError
from fedtune.model.loss import inputs_of, logits_of
from fedtune.model.objectives import OBJECTIVES, Context, CrossEntropy, Objective, Predictions
from fedtune.model.objectives.asft import Asft, Dft
from fedtune.model.objectives.balanced import Balanced
from fedtune.model.objectives.dpo import Dpo
from fedtune.model.objectives.focal import Focal
from fedtune.model.objectives.ipo import Ipo
from fedtune.model.objectives.logit_adjusted import LogitAdjusted
from fedtune.model.objectives.orpo import Orpo
from fedtune.model.objectives.simpo import Simpo
from fedtune.model.settings import TrainSettings
from fedtune.model.training_loss import TrainingLoss, switched_off
from fedtune.model.tunable import attach
from fedtune.rng import stream
from tests import small
from tests.marks import mostly_thorough
from tests.tables import adapter_of

COUNTS = (6, 1, 0, 3)


def dimensions(objective: Objective) -> tuple[int, ...]:
    """Of the labels that it is for: classes, tokens of texts, tokens of pairs of texts."""
    tasks = {"classify": 1, "instruct": 2, "preference": 3}
    return tuple(ndim for task, ndim in tasks.items() if task in objective.tasks)


TRIED: dict[str, tuple[Objective, ...]] = {
    "cross-entropy": (CrossEntropy(), CrossEntropy(smoothing=0.2)),
    "focal": (Focal(), Focal(gamma=0.5)),
    "balanced": (Balanced(),),
    "logit-adjusted": (LogitAdjusted(), LogitAdjusted(tau=0.5)),
    "dft": (Dft(),),
    "asft": (Asft(), Asft(anchor=0.7)),
    "dpo": (Dpo(), Dpo(beta=0.5, smoothing=0.2)),
    "ipo": (Ipo(beta=0.7),),
    "orpo": (Orpo(), Orpo(beta=0.0)),
    "simpo": (Simpo(), Simpo(gamma=0.0, smoothing=0.1)),
}
ALL = [(objective, ndim) for tried in TRIED.values() for objective in tried for ndim in dimensions(objective)]


def made(ndim: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits, labels and a reference's logits in float64; of texts, some tokens carry no loss."""
    draw = stream("objectives", ndim)
    shape = ((5,), (3, 4), (3, 2, 4))[ndim - 1]
    logits, reference = (torch.from_numpy(draw.normal(size=(*shape, 4)) * 2) for _ in range(2))
    labels = torch.from_numpy(draw.choice([0, 1, 3], shape))
    if ndim == 2:
        labels[0, :2] = labels[2, 3] = -100
    elif ndim == 3:  # prompts of unlike lengths, and padding
        labels[0, :, :2] = labels[1, :, 0] = labels[2, 0, 3] = labels[1, 1, 2:] = -100
    return logits, labels, reference


def by_hand(objective: Any, logits: np.ndarray, labels: np.ndarray, reference: np.ndarray) -> float:
    """Row by row."""
    if labels.ndim == 3:
        return sum(pair_by_hand(objective, *one) for one in zip(logits, labels, reference, strict=True))
    total, texts = 0.0, labels.reshape(len(labels), -1)
    tokens = (texts != -100).sum(-1)
    for place in np.ndindex(*labels.shape):
        label = labels[place]
        if label == -100:
            continue
        z = logits[place].astype(float)
        if objective.loss == "logit-adjusted":
            z = z + objective.tau * np.log(np.maximum(COUNTS, 0.1) / np.maximum(COUNTS, 0.1).sum())
        p = np.exp(z) / np.exp(z).sum()
        said = -np.log(p[label])
        if objective.loss == "cross-entropy":
            said = (1 - objective.smoothing) * said - objective.smoothing * np.log(p).mean()
        elif objective.loss == "focal":
            said *= (1 - p[label]) ** objective.gamma
        elif objective.loss == "balanced" and labels.ndim == 1:
            said *= sum(COUNTS) / (np.count_nonzero(COUNTS) * COUNTS[label])
        elif objective.loss == "balanced":
            said *= tokens.sum() / np.count_nonzero(tokens) / tokens[place[0]]
        elif objective.loss in ("dft", "asft"):
            said *= p[label]
            if objective.loss == "asft":
                q = np.exp(reference[place]) / np.exp(reference[place]).sum()
                said += objective.anchor * (q * np.log(q / p)).sum()
        total += said
    return total


def pair_by_hand(objective: Any, logits: np.ndarray, labels: np.ndarray, reference: np.ndarray) -> float:
    """Of one pair, as the papers write it: probabilities of whole responses, or of a token on average."""
    p, q = (
        [[np.exp(row[label]) / np.exp(row).sum() for row, label in zip(*side, strict=True) if label != -100]
         for side in zip(z, labels, strict=True)]
        for z in (logits, reference)
    )  # fmt: skip
    if objective.loss == "dpo":
        better, worse = (np.prod(now) / np.prod(before) for now, before in zip(p, q, strict=True))
        odds = (better / worse) ** objective.beta  # of the chosen response, under Bradley and Terry
        share = odds / (1 + odds)
        return -(1 - objective.smoothing) * np.log(share) - objective.smoothing * np.log(1 - share)
    mean = [np.prod(one) ** (1 / len(one)) for one in p]
    if objective.loss == "ipo":
        before = [np.prod(one) ** (1 / len(one)) for one in q]
        return (np.log(mean[0] / before[0] * before[1] / mean[1]) - 1 / (2 * objective.beta)) ** 2
    if objective.loss == "orpo":
        ratio = mean[0] / (1 - mean[0]) * (1 - mean[1]) / mean[1]
        return -np.log(mean[0]) - objective.beta * np.log(ratio / (1 + ratio))
    odds = (mean[0] / mean[1]) ** objective.beta / np.exp(objective.gamma)
    share = odds / (1 + odds)
    return -(1 - objective.smoothing) * np.log(share) - objective.smoothing * np.log(1 - share)


def test_every_loss_is_enrolled() -> None:
    assert TRIED.keys() == OBJECTIVES.keys()


@pytest.mark.parametrize(("objective", "ndim"), ALL, ids=lambda value: getattr(value, "loss", str(value)))
def test_the_loss_is_its_formula(objective: Objective, ndim: int) -> None:
    logits, labels, reference = made(ndim)
    context = Context(COUNTS if ndim == 1 else ())
    found = objective.summed(Predictions(logits, labels, context, reference if objective.refers else None))
    want = by_hand(objective, logits.numpy(), labels.numpy(), reference.numpy())
    assert found.item() == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize(("objective", "ndim"), ALL, ids=lambda value: getattr(value, "loss", str(value)))
def test_the_gradient_is_a_numerical_one(objective: Objective, ndim: int) -> None:
    """Of losses that are followed by their value; a stopped gradient is compared with the formula's own."""
    logits, labels, reference = made(ndim)
    context = Context(COUNTS if ndim == 1 else ())
    logits.requires_grad_(True)
    if objective.by_values:
        before = reference if objective.refers else None
        assert torch.autograd.gradcheck(
            lambda z: objective.summed(Predictions(z, labels, context, before)), logits
        )
        return
    objective.summed(Predictions(logits, labels, context, reference if objective.refers else None)).backward()
    there = labels != -100
    p, q = logits.detach().softmax(-1)[there], reference.softmax(-1)[there]
    one = torch.nn.functional.one_hot(labels[there], 4)
    want = (p * one).sum(-1, keepdim=True) * (p - one)  # p_y (p - e_y)
    want += getattr(objective, "anchor", 0.0) * (p - q)
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad[there], want)
    assert not logits.grad[~there].any()


NEUTRAL = ({"loss": "focal", "gamma": 0.0}, {"loss": "logit-adjusted", "tau": 0.0})


@pytest.mark.parametrize("table", NEUTRAL, ids=lambda table: table["loss"])
def test_what_weighs_nothing_is_the_plain_run_to_the_bit(
    table: dict[str, Any], tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    want = small.play(small.recipe(tiny_bert, data, rounds=1), tmp_path / "plain")[1]["state_sha256"]
    recipe = small.recipe(tiny_bert, data, rounds=1, method__train__objective=table)
    assert small.play(recipe, tmp_path / "neutral")[1]["state_sha256"] == want


@pytest.mark.parametrize("loss", mostly_thorough(["focal", "balanced", "logit-adjusted"], ["focal"]))
@pytest.mark.parametrize("method", ["fedpeft", "spsa", "gradient"])
def test_methods_train_by_it(loss: str, method: str, tiny_bert: Path, data: Path, tmp_path: Path) -> None:
    kseed = {"type": "fedkseed", "estimator": method, "steps": 2, "batch": 4, "size": 32, "lr": 1e-3}
    changes: dict[str, Any] = {} if method == "fedpeft" else {"method": kseed}
    runs = {
        name: small.play(small.recipe(tiny_bert, data, rounds=1, **changes, **more), tmp_path / name)[1]
        for name, more in (("plain", {}), ("other", {"method__train__objective": {"loss": loss}}))
    }
    assert runs["plain"]["state_sha256"] != runs["other"]["state_sha256"]
    assert runs["other"]["left_out"] == 0 and np.isfinite(runs["other"]["federated"])


def test_the_reference_is_the_model_without_its_adapter(workspace: Any) -> None:
    tunable, encoded = attach(workspace.base("causal"), adapter_of(kind="lora", rank=2), 1), None
    encoded = workspace.encoded("causal")
    batch = encoded.collate([0, 1])
    with torch.no_grad():
        bare = logits_of(tunable, *inputs_of(tunable, dict(batch)))[
            0
        ]  # B is zero: the adapter does nothing yet
        for name, value in tunable.named.items():
            if "lora_B" in name:
                value.normal_(generator=torch.Generator().manual_seed(1))
        tuned = logits_of(tunable, *inputs_of(tunable, dict(batch)))[0]
        for name, value in tunable.named.items():
            value.requires_grad_("lora_A" not in name)  # as rules do that leave a factor alone
        with switched_off(tunable):
            reference = logits_of(tunable, *inputs_of(tunable, dict(batch)))[0]
        again = logits_of(tunable, *inputs_of(tunable, dict(batch)))[0]
    torch.testing.assert_close(reference, bare)
    assert torch.equal(again, tuned)
    assert all(value.requires_grad == ("lora_A" not in name) for name, value in tunable.named.items())
    assert (tuned - bare).abs().max() > 1e-3
    plain, anchored = (
        TrainingLoss.of(one, tunable, encoded)(tunable, dict(batch)) for one in (Dft(), Asft(anchor=1.0))
    )
    logits, labels = logits_of(tunable, *inputs_of(tunable, dict(batch)))
    there = labels != -100
    q, p = bare[there].log_softmax(-1), logits[there].log_softmax(-1)
    torch.testing.assert_close(anchored - plain, (q.exp() * (q - p)).sum(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"method__train__objective": {"loss": "dft"}}, "data.task = 'classify'"),
        ({"method__train__objective": {"loss": "focal", "tau": 1.0}}, "tau"),
        (
            {
                "data__task": "causal-lm",
                "method__adapter": {"kind": "bias"},
                "method__train__objective": {"loss": "asft"},
            },
            "can be switched off",
        ),
        (
            {
                "data__task": "causal-lm",
                "method": {"type": "fedkseed", "estimator": "spsa", "train": {"objective": {"loss": "dft"}}},
            },
            "clients that walk",
        ),
        (
            {"method": {"type": "sfprompt", "tail": 1, "train": {"objective": {"loss": "focal"}}}},
            "a split model",
        ),
    ],
)
def test_what_means_nothing_is_refused(
    changes: dict[str, Any], said: str, tiny_bert: Path, data: Path
) -> None:
    with pytest.raises(FedtuneError, match=said):
        small.recipe(tiny_bert, data, **changes)


def test_training_settings_say_cross_entropy() -> None:
    assert TrainSettings().objective == CrossEntropy() and TrainSettings().objective.plain

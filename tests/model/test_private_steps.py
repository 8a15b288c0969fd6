"""DP-SGD on tiny real models: gradients of rows, their bound, the noise, and what private training leaves."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from fedtune.errors import FedtuneError
from fedtune.model import private_steps
from fedtune.model.fit import fit, make_optimizer, training
from fedtune.model.loss import carries, summed_loss
from fedtune.model.private_steps import adding, hooks_on, private_backward, row_losses, sampled
from fedtune.model.settings import TrainSettings
from fedtune.model.tunable import TunableModel, attach
from fedtune.privacy.noise import Secret
from fedtune.privacy.settings import PrivateTraining
from fedtune.runtime import run as running
from fedtune.runtime.check import check, rows
from fedtune.schema import digest
from tests import small
from tests.model.cases import VARIANTS
from tests.tables import adapter_of

CASES = [  # model, kind, whether opacus finds the gradients of all rows at once
    ("causal", "lora", True),
    ("decoder", "lora", True),
    ("encoder", "lora", True),
    ("images", "lora", True),
    ("encoder", "head", True),
    ("encoder", "bias", True),
    ("encoder", "layernorm", True),
    ("encoder", "adapter", True),
    ("encoder", "full", False),  # its positions are numbered once for all rows
    ("causal", "dora", False),
    ("causal", "ia3", False),
    ("encoder", "shira", False),
    ("causal", "prompt", False),
    ("causal", "prefix", True),
    ("causal", "full", False),
]


def settings(norm: float = 1e6, noise: float = 0.0, rate: float = 0.5, **more: Any) -> TrainSettings:
    private = PrivateTraining(max_grad_norm=norm, noise_multiplier=noise, sample_rate=rate)
    return TrainSettings(
        **{"private": private, "steps": 3, "lr": 1e-2, "batch": 4, "optimizer": "adamw"} | more
    )


def made(workspace: Any, model: str, kind: str) -> tuple[TunableModel, Any]:
    tunable = attach(workspace.base(model), adapter_of(**VARIANTS[kind]), 1)
    with torch.no_grad():
        for value in tunable.named.values():  # LoRA's B is 0 at first, and so A's gradient would be
            value.add_(0.02 * torch.randn(value.shape, generator=torch.Generator().manual_seed(1)))
    return tunable, workspace.encoded(model)


def own_gradient(tunable: TunableModel, encoded: Any, row: int) -> torch.Tensor:
    """What an ordinary backward pass of one row leaves at the trained tensors."""
    for value in tunable.parameters():
        value.grad = None
    batch = encoded.collate([row])
    (summed_loss(tunable, batch)[0] / max(carries(tunable.base.task, batch), 1)).backward()
    return torch.cat(
        [torch.zeros_like(v).flatten() if v.grad is None else v.grad.flatten() for v in tunable.parameters()]
    )


def added(tunable: TunableModel, encoded: Any, chosen: list[int], s: TrainSettings) -> torch.Tensor:
    """The sum of shortened gradients, as a step has it."""
    trained = tunable.parameters()
    sums = [torch.zeros_like(value, dtype=torch.float32) for value in trained]
    with training(tunable, s, 3), adding(tunable, trained, encoded, s) as add:
        for start in range(0, len(chosen), 4):
            add(chosen[start : start + 4], sums)
    return torch.cat([total.flatten() for total in sums])


def still(tunable: TunableModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without dropout, which would draw otherwise for one row than for four."""
    for module in tunable.net.modules():
        if isinstance(module, torch.nn.Dropout):
            monkeypatch.setattr(module, "p", 0.0)


@pytest.mark.parametrize("first", [1, 2])
def test_a_first_draw_of_one_row_decides_nothing(
    first: int, workspace: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How many rows a step has is drawn; positions, numbered once for all, look like a row's while there is one."""
    tunable, encoded = made(workspace, "encoder", "full")
    still(tunable, monkeypatch)
    trained, s = tunable.parameters(), settings()
    sums = [torch.zeros_like(value, dtype=torch.float32) for value in trained]
    with training(tunable, s, 3), adding(tunable, trained, encoded, s) as add:
        add(list(range(first)), sums)
        add(list(range(first, 6)), sums)
    found = torch.cat([total.flatten() for total in sums])
    with training(tunable, s, 3):
        wanted = sum(own_gradient(tunable, encoded, row) for row in range(6))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("model", "kind", "at_once"), CASES)
def test_gradients_of_rows_are_those_of_single_backward_passes(
    workspace: Any, model: str, kind: str, at_once: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each cut to the bound, added up; by opacus for the kinds that it knows, otherwise row by row."""
    tunable, encoded = made(workspace, model, kind)
    still(tunable, monkeypatch)
    ways: list[str] = []
    for name in ("add_rows", "add_row"):
        real = getattr(private_steps, name)
        monkeypatch.setattr(
            private_steps, name, lambda *args, real=real, name=name: ways.append(name) or real(*args)
        )
    chosen = [0, 1, 2, 3, 5]
    with training(tunable, settings(), 3):
        alone = [own_gradient(tunable, encoded, row) for row in chosen]
    bound = float(torch.stack([one.norm() for one in alone]).median())
    wanted = sum(one * min(1.0, bound / float(one.norm())) for one in alone)
    found = added(tunable, encoded, chosen, settings(norm=bound))
    assert float((found - wanted).norm()) <= 1e-5 * float(wanted.norm())
    assert (ways[-1] == "add_rows") is at_once, ways
    assert not any(hasattr(value, "grad_sample") for value in tunable.parameters())


class Counted:
    """A function that counts its calls."""

    def __init__(self, real: Any) -> None:
        self.real, self.calls = real, 0

    def __call__(self, *args: Any) -> Any:
        self.calls += 1
        return self.real(*args)


def test_a_row_gradient_does_not_depend_on_its_batch(workspace: Any) -> None:
    """A mean over a batch's tokens would: rows of other lengths change the share of each token."""
    tunable, encoded = made(workspace, "causal", "lora")
    lengths = [encoded.length(row) for row in range(len(encoded))]
    short, long = int(np.argmin(lengths)), int(np.argmax(lengths))
    assert lengths[short] < lengths[long]
    losses = [
        row_losses(tunable, encoded.collate([short, *others]))[0] for others in ([], [long], [long, long])
    ]
    assert max(losses).item() - min(losses).item() < 1e-5


@pytest.mark.parametrize("model", ["causal", "encoder"])
def test_neighbouring_data_change_a_sum_by_the_bound_at_most(
    workspace: Any, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measured on real gradients: a row added, for every row of ten, at a bound that cuts most of them."""
    tunable, encoded = made(workspace, model, "lora")
    still(tunable, monkeypatch)
    s = settings(norm=0.05)
    count = min(10, len(encoded))
    with training(tunable, s, 3):
        longest = max(float(own_gradient(tunable, encoded, row).norm()) for row in range(count))
    all_rows = added(tunable, encoded, list(range(count)), s)
    apart = [
        float((all_rows - added(tunable, encoded, [r for r in range(count) if r != row], s)).norm())
        for row in range(count)
    ]
    assert longest > 0.1 and max(apart) <= 0.05 * (1 + 1e-4) and max(apart) > 0.0499


def test_without_noise_and_bound_it_is_ordinary_training_on_the_same_batches(
    workspace: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SGD on the sum over the rows that chance chose, over the rows that it chooses on average."""
    tunable, encoded = made(workspace, "causal", "lora")
    still(tunable, monkeypatch)
    start, s = tunable.read(), settings(norm=1e9, steps=5, optimizer="sgd", lr=0.1, momentum=0.9)
    steps = [[[0, 1, 2, 3], [4]], [], [[2]], [[1, 5]], [[0, 3, 4]]]
    monkeypatch.setattr("fedtune.model.fit.sampled", lambda *args: iter(steps))
    fit(tunable, encoded, s, 7)
    private = tunable.read()
    tunable.write(start)
    optimizer = make_optimizer(tunable, s, {})
    with training(tunable, s, 7):
        for micro in steps:
            gradient = sum(
                (own_gradient(tunable, encoded, row) for part in micro for row in part), torch.zeros(1)
            )
            parts = gradient.expand(sum(v.numel() for v in tunable.parameters())).split(
                [v.numel() for v in tunable.parameters()]
            )
            for value, part in zip(tunable.parameters(), parts, strict=True):
                value.grad = part.reshape(value.shape) / (0.5 * len(encoded))
            optimizer.step()
    plain = tunable.read()
    for name in plain:
        np.testing.assert_allclose(private[name], plain[name], atol=2e-6, err_msg=name)


def test_a_step_without_rows_is_noise_of_its_size(workspace: Any) -> None:
    tunable, encoded = made(workspace, "encoder", "full")
    s = settings(norm=2.0, noise=1.5, rate=0.25)
    optimizer = make_optimizer(tunable, s, {})
    with training(tunable, s, 3), private_backward(tunable, encoded, s, Secret()) as backward:
        assert backward([], [], 0) == 0.0
        noise = torch.cat([value.grad.flatten() for value in tunable.parameters()]).double().numpy()
        optimizer.step()
    assert stats.kstest(noise * 0.25 * len(encoded) / 3.0, "norm").pvalue > 1e-6


def test_rows_are_in_a_step_by_chance_alone() -> None:
    s = settings(rate=0.3, steps=2000)
    steps = list(sampled(20, s, Secret()))
    assert len(steps) == 2000 and all(len(part) <= 4 for step in steps for part in step)
    counts = np.bincount([row for step in steps for part in step for row in part], minlength=20)
    assert stats.chisquare(np.append(counts, 40_000 - counts.sum()), [600] * 20 + [28_000]).pvalue > 1e-6
    assert stats.binomtest(sum(not step for step in steps), 2000, 0.7**20).pvalue > 1e-6  # empty ones, too


def test_passes_are_counted_by_rows_on_average() -> None:
    assert settings(steps=0, epochs=3, rate=0.25).private_steps == 12


@pytest.mark.parametrize("missing", [False, True])
def test_checkpointing_and_a_missing_opacus_change_nothing(
    workspace: Any, missing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Opacus finds no gradient behind checkpoints that are not reentrant: rows go one by one."""
    tunable, encoded = made(workspace, "causal", "lora")
    wanted = added(tunable, encoded, [0, 1, 2], settings())
    if missing:
        monkeypatch.setitem(sys.modules, "opacus.grad_sample", None)
    s = settings(checkpointing=not missing)
    assert hooks_on(tunable, tunable.parameters(), s) is None
    found = added(tunable, encoded, [0, 1, 2], s)
    assert float((found - wanted).norm()) <= 1e-5 * float(wanted.norm())


def test_opacus_is_not_trusted_where_it_is_wrong(workspace: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tunable, encoded = made(workspace, "causal", "lora")
    wanted = added(tunable, encoded, [0, 1, 2], settings())
    real = private_steps.by_row
    monkeypatch.setattr(private_steps, "by_row", lambda value, count: real(value, count).flip(0) * 1.1)
    found = added(tunable, encoded, [0, 1, 2], settings())
    assert float((found - wanted).norm()) <= 1e-5 * float(wanted.norm())


def test_dropout_is_no_reason_to_go_row_by_row(workspace: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check of opacus then looks at one row, whose dropout is drawn alike in both ways."""
    tunable, encoded = made(workspace, "encoder", "lora")
    for module in tunable.net.modules():
        if isinstance(module, torch.nn.Dropout):
            monkeypatch.setattr(module, "p", 0.3)
    assert private_steps.draws(tunable.net)
    monkeypatch.setattr(private_steps, "add_row", counted := Counted(private_steps.add_row))
    before = tunable.read()
    fit(tunable, encoded, settings(norm=1.0, noise=0.1, rate=1.0), 5)
    assert digest(tunable.read()) != digest(before) and counted.calls == 1


# --- whole runs ---

PRIVATE = {"max_grad_norm": 1.0, "noise_multiplier": 4.0, "sample_rate": 0.2}
TRAIN = {"lr": 0.01, "steps": 3, "batch": 4, "private": PRIVATE}


@pytest.mark.thorough
def test_a_private_run_counts_its_epsilon_and_exports_what_it_trained(
    tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    """Stock peft answers with the exported adapter as the trained model did."""
    import peft
    import transformers

    recipe = small.recipe(tiny_bert, data, method__train=TRAIN, rounds=2)
    folder, result, events = small.play(recipe, tmp_path)
    import dp_accounting
    from dp_accounting import pld

    own = pld.PLDAccountant()
    own.compose(
        dp_accounting.SelfComposedDpEvent(
            dp_accounting.PoissonSampledDpEvent(0.2, dp_accounting.GaussianDpEvent(4.0)), 6
        )
    )
    assert result["epsilon"] == pytest.approx(own.get_epsilon(1e-5), abs=1e-3)
    assert "whether one row of a client's was there" in result["privacy"][0]
    assert not any("loss" in getattr(event, "metrics", {}) for event in events)
    state, _ = running.load_state(folder, 2, "")
    workspace, link = small.workspace_of(recipe)
    link.method.install(state, workspace.tunable)
    batch = workspace.train(0).collate([0, 1, 2])
    arguments = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        trained = workspace.tunable.net(**arguments).logits
    stock = transformers.AutoModelForSequenceClassification.from_pretrained(tiny_bert, num_labels=3)
    stock = peft.PeftModel.from_pretrained(stock, folder.adapter).eval()
    with torch.no_grad():
        torch.testing.assert_close(stock(**arguments).logits, trained, atol=1e-5, rtol=1e-5)


def test_check_says_epsilon_of_rows(tiny_bert: Path, data: Path) -> None:
    checked = check(small.recipe(tiny_bert, data, method__train=TRAIN, rounds=2))
    lines = "\n".join(rows(checked))
    assert "after 2 rounds; hidden: whether one row of a client's" in lines and "meaningless" not in lines
    sees = {row.verb: row.sees for row in checked.exposed}
    assert "trained privately" in sees["train"] and "loss" not in sees["figures"]


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no bound": ({"private": {"noise_multiplier": 1.0}}, "[method.train.private] without max_grad_norm"),
    "clip": ({"clip": 1.0}, "method.train.clip with method.train.private"),
    "accumulate": ({"accumulate": 2}, "method.train.accumulate with"),
}
METHODS: dict[str, tuple[dict[str, Any], str]] = {
    "class sums": ({"head_start": "lda"}, "the question 'features'"),
    "tokens": ({"weight": "tokens"}, "method.weight = 'tokens'"),
    "sfprompt": ({"type": "sfprompt", "weight": "equal"}, "method.type = 'sfprompt'"),
    "experts": ({"type": "experts"}, "method.type = 'experts'"),
}


@pytest.mark.parametrize("name", [*WRONG, *METHODS, "carried"])
def test_recipes_whose_bound_would_not_hold_are_refused(name: str, tmp_path: Path) -> None:
    method = {"type": "fedpeft", "head_start": "random", "train": dict(TRAIN)}
    more: dict[str, Any] = {}
    if name in WRONG:
        changes, words = WRONG[name]
        method["train"] = {**TRAIN, **changes}
    elif name in METHODS:
        changes, words = METHODS[name]
        method |= changes
    else:
        more, words = {"aggregate": {"rule": "fedex"}}, "method.train.private with aggregate.rule = 'fedex'"
    with pytest.raises(FedtuneError) as caught:
        small.recipe(tmp_path, tmp_path / "rows.jsonl", method=method, **more)
    assert caught.value.code == "C104" and words in str(caught.value)


def test_noise_of_a_whole_round_is_not_repeated(tiny_bert: Path, data: Path, tmp_path: Path) -> None:
    recipe = small.recipe(tiny_bert, data, method__train=TRAIN, rounds=1)
    one, two = (small.play(recipe, tmp_path / name)[1]["state_sha256"] for name in ("one", "two"))
    assert one != two and math.isfinite(float(int(one, 16)))


def test_training_that_leaves_no_trace_is_a_mistake(workspace: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tunable, encoded = made(workspace, "causal", "lora")
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: None)
    with pytest.raises(FedtuneError, match="no trained number has changed") as caught:
        fit(tunable, encoded, settings(norm=1.0, noise=1.0), 5)
    assert caught.value.code == "P903"

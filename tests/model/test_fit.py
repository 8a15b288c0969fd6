"""The local loop against plain torch and plain peft, and each of its terms against arithmetic."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from torch.nn.functional import cross_entropy

from fedtune.errors import ClientFailed, FedtuneError
from fedtune.model.encode import encode
from fedtune.model.fit import fit, schedule_factor, step_batches
from fedtune.model.settings import TrainSettings
from fedtune.model.tunable import attach
from fedtune.schema import digest
from tests import tiny
from tests.tables import adapter_of


def adamw(parameters: list[Any], settings: TrainSettings) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=settings.weight_decay)


def plain_loop(
    net: Any, optimizer: torch.optim.Optimizer, encoded: Any, settings: TrainSettings, seed: int
) -> None:
    """Ordinary training, as anybody would write it."""
    net.train()
    for (indices,) in step_batches(len(encoded), settings, seed):
        batch = encoded.collate(indices)
        optimizer.zero_grad()
        logits = net(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        labels = batch["labels"]
        if labels.ndim == 2:
            logits, labels = logits[:, :-1], labels[:, 1:]
        cross_entropy(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)).backward()
        optimizer.step()


SETTINGS = TrainSettings(steps=7, lr=1e-2, batch=4, weight_decay=0.01)


@pytest.mark.parametrize("model", ["causal", "encoder"])
def test_full_equals_a_plain_torch_loop_bit_for_bit(workspace: Any, model: str) -> None:
    base, encoded = workspace.base(model), workspace.encoded(model)
    tunable = attach(base, adapter_of(kind="full"), 1)
    start = tunable.read()
    fit(tunable, encoded, SETTINGS, 9)
    auto = (
        transformers.AutoModelForCausalLM
        if model == "causal"
        else transformers.AutoModelForSequenceClassification
    )
    net = auto.from_pretrained(workspace.folders[model])
    net.load_state_dict({name: torch.from_numpy(value) for name, value in start.items()}, strict=False)
    plain_loop(net, adamw(list(net.parameters()), SETTINGS), encoded, SETTINGS, 9)
    theirs = {name: value.detach().numpy() for name, value in net.named_parameters()}
    assert digest(tunable.read()) == digest(theirs)


def test_lora_equals_a_plain_peft_loop_bit_for_bit(workspace: Any) -> None:
    base, encoded = workspace.base("causal"), workspace.encoded("causal")
    tunable = attach(base, adapter_of(rank=4, alpha=8.0, targets=("q_proj", "v_proj")), 11)
    start = tunable.read()
    fit(tunable, encoded, SETTINGS, 9)
    net = transformers.AutoModelForCausalLM.from_pretrained(workspace.folders["causal"])
    torch.manual_seed(11)
    net = peft.get_peft_model(
        net, peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    )
    assert digest(peft_state(net)) == digest(
        start
    )  # peft's own initialisation from the same seed, under peft's own file names
    trained = [value for value in net.parameters() if value.requires_grad]
    plain_loop(net, adamw(trained, SETTINGS), encoded, SETTINGS, 9)
    assert digest(peft_state(net)) == digest(tunable.read())


def peft_state(net: Any) -> dict[str, np.ndarray]:
    return {
        name: value.detach().clone().numpy()
        for name, value in peft.get_peft_model_state_dict(net, save_embedding_layers=False).items()
    }


def test_same_seed_same_bytes_and_dropout_is_seeded(workspace: Any, tmp_path: Any) -> None:
    from fedtune.model.base import load
    from fedtune.model.settings import ModelSettings

    base = load(
        ModelSettings(name=str(tiny.bert(tmp_path, dropout=0.2)), threads=1), "classify", ("a", "b"), 1
    )
    encoded = encode(tiny.texts(), base, max_length=16)

    def once(seed: int) -> str:
        tunable = attach(base, adapter_of(dropout=0.1), 1)
        torch.rand(3)
        fit(tunable, encoded, TrainSettings(steps=3, batch=6), seed)
        return digest(tunable.read())

    outside = torch.get_rng_state()
    assert once(1) == once(1) != once(2)
    torch.set_rng_state(outside)
    expected = torch.rand(3), torch.rand(3)  # what two calls of `once` draw between
    torch.set_rng_state(outside)
    once(1)
    assert torch.equal(torch.rand(3), expected[1])  # training does not move the global generator


@pytest.mark.parametrize("model", ["causal", "instruct", "encoder", "images"])
def test_accumulation_equals_one_big_batch(workspace: Any, model: str) -> None:
    """Examples of different lengths: a mean of micro-batch means would differ."""
    base, encoded = workspace.base(model), workspace.encoded(model)
    results = []
    for batch, accumulate in ((len(encoded), 1), (2, len(encoded) // 2)):
        tunable = attach(base, adapter_of(), 1)
        report = fit(
            tunable,
            encoded,
            TrainSettings(optimizer="sgd", lr=0.1, steps=1, batch=batch, accumulate=accumulate),
            3,
        )
        results.append((tunable.read(), report.loss, report.examples, report.tokens))
    assert results[0][2:] == results[1][2:] == (len(encoded), encoded.tokens)
    assert math.isclose(results[0][1], results[1][1], rel_tol=1e-5)
    for name, value in results[0][0].items():
        np.testing.assert_allclose(results[1][0][name], value, atol=1e-6)


@pytest.mark.parametrize("room", [3, 1, 0])
def test_a_micro_batch_that_does_not_fit_the_device_is_halved_and_the_step_done_again(
    workspace: Any, room: int, monkeypatch: pytest.MonkeyPatch, forgetful: None
) -> None:
    """A device that holds `room` examples: 8 are tried as 4, 2, 1; the sums are those of one big batch. Not
    even one: a sentence."""
    base = workspace.base("encoder")
    rows = [{"text": text, "label": "ab"[i % 2]} for i, text in enumerate((tiny.SENTENCES * 3)[:16])]
    encoded = encode(rows, base, max_length=12)
    settings, seen = TrainSettings(steps=2, lr=1e-2, batch=8), list[int]()

    def trained(limit: int) -> dict[str, np.ndarray]:
        tunable = attach(base, adapter_of(kind="head"), 1)
        real = base.net.forward

        def forward(*given: Any, **named: Any) -> Any:
            count = len(named["input_ids"])
            seen.append(count)
            if count > limit:
                raise torch.OutOfMemoryError("pretended")
            return real(*given, **named)

        monkeypatch.setattr(base.net, "forward", forward)
        try:
            fit(tunable, encoded, settings, 5)
            return tunable.read()
        finally:
            monkeypatch.undo()

    if room == 0:
        with pytest.raises(ClientFailed, match="M309: a single example"):
            trained(0)
        return
    whole = trained(8)
    seen.clear()
    halved = trained(room)
    assert seen[0] == 8 and max(seen[-4:]) == (
        2 if room == 3 else 1
    )  # the second step does not try again what was too much
    seen.clear()
    trained(room)
    assert max(seen) <= room  # nor does the next client
    for name, value in whole.items():
        np.testing.assert_allclose(halved[name], value, atol=2e-6)


def test_fedprox_by_hand(workspace: Any) -> None:
    """Two SGD steps: the first sees no pull, since w = w_round; the second is pulled by lr * mu * (w -
    w_round)."""
    base, encoded = workspace.base("encoder"), workspace.encoded("encoder")
    settings = {"optimizer": "sgd", "lr": 0.1, "batch": 6}

    def after(steps: int, prox: float) -> dict[str, np.ndarray]:
        tunable = attach(base, adapter_of(kind="bias"), 1)
        fit(tunable, encoded, TrainSettings(steps=steps, prox=prox, **settings), 3)
        return tunable.read()

    start = attach(base, adapter_of(kind="bias"), 1).read()
    one, two, pulled = after(1, 0.0), after(2, 0.0), after(2, 0.5)
    assert digest(one) == digest(after(1, 0.5))
    for name in start:
        np.testing.assert_allclose(pulled[name], two[name] - 0.1 * 0.5 * (one[name] - start[name]), atol=1e-7)


def test_the_head_and_named_tensors_have_rates_of_their_own(workspace: Any) -> None:
    """One step of plain SGD moves a tensor by its rate times its gradient."""
    base, encoded = workspace.base("encoder"), workspace.encoded("encoder")
    start = attach(base, adapter_of(kind="bias"), 1).read()
    own = next(name for name in start if "classifier" not in name)

    def moved(rates: dict[str, float] | None = None, **settings: Any) -> dict[str, np.ndarray]:
        tunable = attach(base, adapter_of(kind="bias"), 1)
        known = TrainSettings(optimizer="sgd", lr=0.125, steps=1, batch=6, **settings)
        fit(tunable, encoded, known, 3, rates=rates)
        return {name: value - start[name] for name, value in tunable.read().items()}

    plain, faster, named = moved(), moved(head_lr=0.5), moved({own: 0.25}, head_lr=0.5)
    assert all(np.abs(value).max() > 0 for value in plain.values())
    for name, value in plain.items():
        head = 4 if "classifier" in name else 1
        np.testing.assert_allclose(faster[name], head * value, rtol=1e-3, atol=1e-8)
        np.testing.assert_allclose(named[name], (2 if name == own else head) * value, rtol=1e-3, atol=1e-8)


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_has_torchs_momentum_and_decay(workspace: Any, nesterov: bool) -> None:
    base, encoded = workspace.base("encoder"), workspace.encoded("encoder")
    more = {"momentum": 0.9, "nesterov": nesterov, "weight_decay": 0.1}
    tunable = attach(base, adapter_of(kind="full"), 1)
    start = tunable.read()
    settings = TrainSettings(optimizer="sgd", lr=0.1, steps=3, batch=4, **more)
    fit(tunable, encoded, settings, 9)
    net = transformers.AutoModelForSequenceClassification.from_pretrained(workspace.folders["encoder"])
    net.load_state_dict({name: torch.from_numpy(value) for name, value in start.items()}, strict=False)
    plain_loop(net, torch.optim.SGD(net.parameters(), lr=0.1, **more), encoded, settings, 9)
    assert digest(tunable.read()) == digest({n: v.detach().numpy() for n, v in net.named_parameters()})


def test_clipping_limits_the_step(workspace: Any) -> None:
    tunable = attach(workspace.base("encoder"), adapter_of(), 1)
    start = tunable.read()
    fit(tunable, workspace.encoded("encoder"), TrainSettings(optimizer="sgd", lr=1.0, steps=1, clip=0.01), 3)
    moved = math.sqrt(
        sum(float(((value - start[name]) ** 2).sum()) for name, value in tunable.read().items())
    )
    assert math.isclose(moved, 0.01, rel_tol=1e-3)


@pytest.mark.parametrize("variant", ["lora", "adapter", "full", "bias"])
def test_recomputation_gives_the_same_bytes(workspace: Any, variant: str) -> None:
    states = []
    for checkpointing in (False, True):
        tunable = attach(
            workspace.base("causal" if variant != "bias" else "encoder"), adapter_of(kind=variant), 1
        )
        calls = count_calls(tunable)
        fit(
            tunable,
            workspace.encoded("causal" if variant != "bias" else "encoder"),
            TrainSettings(steps=2, checkpointing=checkpointing),
            3,
        )
        states.append((digest(tunable.read()), len(calls)))
    assert states[0][0] == states[1][0]
    assert states[1][1] == 2 * states[0][1]  # each block ran twice: it was really recomputed


def count_calls(tunable: Any) -> list[int]:
    """Grows by one whenever the attention of the first block runs (recomputation stops before a block's last
    layer: its output is not needed)."""
    from fedtune.model.blocks import block_list

    calls: list[int] = []
    block = block_list(tunable.base.net)[0]
    (block.self_attn if hasattr(block, "self_attn") else block.attention).register_forward_hook(
        lambda *_: calls.append(1)
    )
    return calls


def test_prefixes_cannot_be_recomputed(workspace: Any) -> None:
    tunable = attach(workspace.base("causal"), adapter_of(kind="prefix"), 1)
    with pytest.raises(FedtuneError, match="M306"):
        fit(tunable, workspace.encoded("causal"), TrainSettings(steps=1, checkpointing=True), 3)


def test_a_loss_that_is_not_finite_stops_the_client(workspace: Any) -> None:
    tunable = attach(workspace.base("encoder"), adapter_of(kind="head"), 1)
    tunable.write({name: np.full_like(value, np.nan) for name, value in tunable.read().items()})
    with pytest.raises(ClientFailed, match=r"W607.*nan at local step 1"):
        fit(tunable, workspace.encoded("encoder"), TrainSettings(steps=5), 3)
    with pytest.raises(FedtuneError, match="D205"):
        fit(tunable, encode([], workspace.base("encoder"), max_length=8), TrainSettings(steps=5), 3)


def test_batches_are_epochs_of_permutations() -> None:
    steps = list(step_batches(5, TrainSettings(steps=6, batch=2), 1))
    assert [len(b) for (b,) in steps] == [2, 2, 1, 2, 2, 1]
    for epoch in (steps[:3], steps[3:]):
        assert sorted(i for (b,) in epoch for i in b) == [0, 1, 2, 3, 4]
    assert (
        steps
        == list(step_batches(5, TrainSettings(steps=6, batch=2), 1))
        != list(step_batches(5, TrainSettings(steps=6, batch=2), 2))
    )
    assert [
        [len(b) for b in micro]
        for micro in step_batches(5, TrainSettings(steps=0, epochs=2, batch=2, accumulate=2), 1)
    ] == [[2, 2], [1, 2], [2, 1]]
    assert [sorted(b) for (b,) in step_batches(3, TrainSettings(steps=2, batch=8), 1)] == [[0, 1, 2]] * 2


def test_buckets_are_the_same_epochs_with_little_padding() -> None:
    lengths = np.random.default_rng(1).integers(4, 65, 100).tolist()

    def epoch(bucket: int, seed: int = 1) -> list[Any]:
        settings = TrainSettings(steps=0, epochs=1, batch=4, bucket=bucket)
        return [batch for (batch,) in step_batches(100, settings, seed, lengths.__getitem__)]

    def places(batches: list[Any]) -> int:
        return sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)

    plain, even = epoch(1), epoch(25)
    assert sorted(i for batch in even for i in batch) == list(range(100)) and epoch(25) == even != epoch(
        25, 2
    )
    assert sum(lengths) <= places(even) < 1.1 * sum(lengths) < 1.3 * sum(lengths) < places(plain)
    order = [max(lengths[i] for i in batch) for batch in even]
    assert order != sorted(order) and order != sorted(order, reverse=True)  # and not from long to short
    for first in range(0, 100, 8):  # the examples of two batches stay among themselves
        assert {i for b in epoch(2)[first // 4 : first // 4 + 2] for i in b} == {
            i for b in plain[first // 4 : first // 4 + 2] for i in b
        }


def test_schedules_run_over_all_rounds() -> None:
    """4 rounds of 5 steps: 20 steps; a warm-up over a quarter of them."""

    def factors(schedule: str, warmup: float, floor: float = 0.0) -> list[float]:
        settings = TrainSettings(schedule=schedule, warmup=warmup, floor=floor)  # type: ignore[arg-type]
        return [schedule_factor(settings, (done, 4), step, 5) for done in range(4) for step in range(5)]

    assert factors("constant", 0.0) == [1.0] * 20
    np.testing.assert_allclose(factors("constant", 0.25), [0.2, 0.4, 0.6, 0.8] + [1.0] * 16)
    np.testing.assert_allclose(factors("linear", 0.0), [1 - k / 20 for k in range(20)])
    np.testing.assert_allclose(
        factors("cosine", 0.0), [0.5 * (1 + math.cos(math.pi * k / 20)) for k in range(20)]
    )
    np.testing.assert_allclose(factors("linear", 0.25)[5:], [1 - k / 15 for k in range(15)])
    np.testing.assert_allclose(factors("linear", 0.0, 0.2), [1 - 0.8 * k / 20 for k in range(20)])
    np.testing.assert_allclose(
        factors("cosine", 0.0, 0.1), [0.1 + 0.45 * (1 + math.cos(math.pi * k / 20)) for k in range(20)]
    )


def test_bfloat16_autocast_trains_close_to_float32(workspace: Any) -> None:
    losses = []
    for autocast in ("off", "bfloat16"):
        tunable = attach(workspace.base("causal"), adapter_of(), 1)
        losses.append(
            fit(
                tunable, workspace.encoded("causal"), TrainSettings(steps=5, lr=1e-2, autocast=autocast), 3
            ).loss
        )
    assert losses[0] != losses[1]
    assert math.isclose(*losses, rel_tol=0.02)

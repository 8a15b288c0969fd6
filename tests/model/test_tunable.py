"""Attaching and detaching: seeded, bit for bit undone, and only the named tensors ever change."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fedtune.errors import FedtuneError
from fedtune.model.adapters import ADAPTERS
from fedtune.model.encode import encode
from fedtune.model.fit import fit
from fedtune.model.loss import summed_loss
from fedtune.model.score import score
from fedtune.model.settings import TrainSettings
from fedtune.model.tunable import attach, detach
from fedtune.schema import digest
from tests.model.cases import ALL, REFUSED, VARIANTS
from tests.tables import adapter_of
from tests.tunables import bare


def logits(tunable: Any, encoded: Any) -> torch.Tensor:
    with torch.no_grad():
        return summed_loss(tunable, encoded.collate(range(3)))[1]


@pytest.mark.parametrize(("model", "variant"), ALL)
def test_every_kind_learns_and_leaves_no_trace(workspace: Any, model: str, variant: str) -> None:
    base, encoded = workspace.base(model), workspace.encoded(model)
    pristine = {name: value.clone() for name, value in base.weights.items()}
    before = logits(bare(base), encoded)

    tunable = attach(base, adapter_of(**VARIANTS[variant]), 3)
    start, first = tunable.read(), score(tunable, encoded).loss
    fit(tunable, encoded, TrainSettings(steps=20, lr=1e-2, batch=6), 5)
    assert score(tunable, encoded).loss < first - 0.01
    after = tunable.read()
    stuck = [name for name in after if np.array_equal(after[name], start[name])]
    assert not stuck  # everything that travels was trained
    assert all(value.dtype == np.float32 for value in after.values())

    assert all(torch.equal(base.weights[name], pristine[name]) for name in pristine)  # nothing else changed
    detach(tunable)
    assert {name: id(value) for name, value in base.net.named_parameters()} == {
        name: id(value) for name, value in base.weights.items()
    }
    assert torch.equal(logits(bare(base), encoded), before)

    again = attach(base, adapter_of(**VARIANTS[variant]), 3)  # a second life from the same seed
    assert digest(again.read()) == digest(start)
    again.write(after)
    assert digest(again.read()) == digest(after)
    assert again.trainable == sum(value.size for value in after.values())


@pytest.mark.parametrize(("model", "variant"), sorted(REFUSED))
def test_kinds_that_a_model_cannot_have_are_refused_and_leave_it_alone(
    workspace: Any, model: str, variant: str
) -> None:
    base = workspace.base(model)
    detach(attach(base, adapter_of(kind="full"), 0))
    with pytest.raises(FedtuneError, match="M306"):
        attach(base, adapter_of(**VARIANTS[variant]), 3)
    assert base.attached is None
    assert dict(base.net.named_parameters()).keys() == base.weights.keys()


def test_the_seed_decides_the_start_and_another_seed_another(workspace: Any) -> None:
    base = workspace.base("encoder")
    one = attach(base, adapter_of(), 1).read()
    torch.rand(7)
    same, other = attach(base, adapter_of(), 1).read(), attach(base, adapter_of(), 2).read()
    assert digest(one) == digest(same) != digest(other)


UNMOVED = [
    "lora", "dora", "bias", "adapter", "ia3", "layernorm", "shira", "shira magnitude", "lift", "dsee", "deft",
    "head", "full",
]  # fmt: skip


@pytest.mark.parametrize("variant", UNMOVED)
def test_the_first_state_is_the_base_itself(workspace: Any, variant: str) -> None:
    base, encoded = workspace.base("encoder"), workspace.encoded("encoder")
    plain = logits(bare(base), encoded)
    assert torch.allclose(logits(attach(base, adapter_of(**VARIANTS[variant]), 3), encoded), plain, atol=1e-6)


def test_a_bench_that_was_taken_off_is_not_used_by_mistake(workspace: Any) -> None:
    base, encoded = workspace.base("encoder"), workspace.encoded("encoder")
    untouched = bare(base)
    old = attach(base, adapter_of(kind="head"), 1)
    new = attach(base, adapter_of(kind="bias"), 1)
    detach(old)  # is off already: the new one stays
    assert base.attached is new
    for stale in (old, untouched):
        with pytest.raises(RuntimeError, match="taken off"):
            score(stale, encoded)
    assert score(new, encoded).count == 6


def test_a_state_that_does_not_fit_is_refused_and_nothing_is_written(workspace: Any) -> None:
    tunable = attach(workspace.base("encoder"), adapter_of(kind="head"), 1)
    good = tunable.read()
    assert good.keys() == {"classifier.weight", "classifier.bias"}
    for wrong in (
        {"classifier.bias": good["classifier.bias"] + 1},
        good | {"more": good["classifier.bias"]},
        {name: value.astype(np.float64) + 1 for name, value in good.items()},
        {"classifier.bias": good["classifier.bias"] + 1, "classifier.weight": good["classifier.weight"][:1]},
    ):
        with pytest.raises(FedtuneError, match="M305"):
            tunable.write(wrong)
        assert digest(tunable.read()) == digest(good)


def test_counts_on_paper(workspace: Any) -> None:
    """BERT of width 32, 2 blocks, feed-forward 64: per block LoRA meets q, k, v, o (32 -> 32) and two
    feed-forward layers; and the pooler."""
    base = workspace.base("encoder")
    head = 2 * 32 + 2
    lora = attach(base, adapter_of(rank=2), 1)
    assert lora.trainable == head + 2 * (2 * (4 * (32 + 32) + 2 * (32 + 64)) + (32 + 32))
    assert lora.total == base.size + lora.trainable - head  # the head is trained in place
    bias = attach(base, adapter_of(kind="bias"), 1)
    assert (
        bias.trainable == head + 2 * (4 * 32 + 64 + 32 + 2 * 32) + 32 + 32
    )  # blocks, embedding norm, pooler
    assert bias.total == base.size
    adapter = attach(base, adapter_of(kind="adapter", reduction=8), 1)
    assert adapter.trainable == head + (32 * 4 + 4) + (4 * 32 + 32)
    assert attach(base, adapter_of(kind="prompt", deep=True, tokens=5), 1).trainable == head + 2 * 5 * 32
    assert attach(base, adapter_of(kind="head"), 1).trainable == head
    assert attach(base, adapter_of(kind="full"), 1).trainable == base.size


def test_an_unknown_target_lists_what_is_there(workspace: Any) -> None:
    with pytest.raises(FedtuneError, match=r"M302.*'q_proj'.*dense.*query"):
        attach(workspace.base("encoder"), adapter_of(targets=("q_proj",)), 1)
    some = attach(workspace.base("encoder"), adapter_of(targets=("query", "layer.1.output.dense")), 1)
    assert sum("lora_A" in name for name in some.named) == 3


def test_a_head_tied_to_the_embeddings_is_refused(tmp_path: Any) -> None:
    from fedtune.model.base import load
    from fedtune.model.settings import ModelSettings
    from tests import tiny

    base = load(ModelSettings(name=str(tiny.llama(tmp_path, tie=True)), threads=1), "causal-lm", (), 1)
    with pytest.raises(FedtuneError, match=r"M306.*tied"):
        attach(base, adapter_of(kind="head"), 1)
    full = attach(base, adapter_of(kind="full"), 1)
    assert full.trainable == base.size  # tied ones once
    assert full.base.net.lm_head.weight is full.base.net.model.embed_tokens.weight


def test_both_layers_of_a_bottleneck_at_zero_would_never_learn(workspace: Any) -> None:
    """FedPEFT's code starts both at zero; this is why we do not."""
    base, encoded = workspace.base("encoder"), workspace.encoded("encoder")
    tunable = attach(base, adapter_of(kind="adapter"), 3)
    zeros = {
        name: np.zeros_like(value) if name.startswith("bottlenecks") else value
        for name, value in tunable.read().items()
    }
    tunable.write(zeros)
    fit(tunable, encoded, TrainSettings(steps=3, lr=1e-2, batch=6), 5)
    moved = {name for name, value in tunable.read().items() if name.startswith("bottlenecks") and value.any()}
    assert moved == {"bottlenecks.0.up.bias"}


def test_shallow_prompts_of_ours_equal_embeddings_put_in_by_hand(workspace: Any) -> None:
    """A generative classifier: the same logits as its backbone on [prompts; words] read at the last word."""
    base, encoded = workspace.base("decoder"), workspace.encoded("decoder")
    batch = encoded.collate([0])
    tunable = attach(base, adapter_of(kind="prompt", tokens=4), 3)
    ours = logits(tunable, encoded)[0]
    prompts = tunable.named["prompts"].detach()
    detach(tunable)
    with torch.no_grad():
        words = base.net.model.embed_tokens(batch["input_ids"])
        hidden = base.net.model(inputs_embeds=torch.cat([prompts, words], 1)).last_hidden_state
        assert torch.allclose(base.net.score(hidden[0, -1]), ours, atol=1e-5)


def test_every_kind_is_enrolled() -> None:
    assert {variant["kind"] for variant in VARIANTS.values()} == set(ADAPTERS)


@pytest.mark.parametrize(("model", "variant"), ALL)
def test_a_bfloat16_base_trains_float32_tensors(workspace: Any, model: str, variant: str) -> None:
    base, encoded = workspace.load(model, dtype="bfloat16"), workspace.encoded(model)
    tunable = attach(base, adapter_of(**VARIANTS[variant]), 3)
    assert {value.dtype for value in tunable.parameters()} == {torch.float32}
    first = score(tunable, encoded).loss
    fit(tunable, encoded, TrainSettings(steps=10, lr=1e-2, batch=6), 5)
    assert score(tunable, encoded).loss < first
    assert {value.dtype for value in base.weights.values()} == {torch.bfloat16}


def test_virtual_tokens_need_room(workspace: Any) -> None:
    """The encoder has 32 places: 30 words and 4 prompts do not fit, unless the prompts stand behind the
    embeddings."""
    base = workspace.base("encoder")
    encoded = encode([{"text": "the " * 40, "label": "a"}], base, max_length=30)
    with pytest.raises(FedtuneError, match=r"D207.*30 tokens and 4 virtual.*32.*28"):
        score(attach(base, adapter_of(kind="prompt", tokens=4), 1), encoded)
    assert score(attach(base, adapter_of(kind="prompt", tokens=4, deep=True), 1), encoded).count == 1

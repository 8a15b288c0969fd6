"""The loss in pieces is the loss of all logits, of which a piece is in memory; models whose logits are not what
their output layer says keep the plain way."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

from fedtune.model import loss_pieces
from fedtune.model.base import Base
from fedtune.model.collate import collate_text
from fedtune.model.encode import Encoded
from fedtune.model.fit import fit
from fedtune.model.loss import summed_loss
from fedtune.model.score import score
from fedtune.model.settings import TrainSettings
from fedtune.model.tunable import TunableModel, attach
from tests.tables import adapter_of

WIDTH = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES = WIDTH | {"num_key_value_heads": 2, "head_dim": 8, "vocab_size": 120, "initializer_range": 0.2}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 120, "n_positions": 64}
PLAIN = {
    "llama": transformers.LlamaConfig(**SIZES),
    "llama, tied": transformers.LlamaConfig(**SIZES, tie_word_embeddings=True),
    "qwen3": transformers.Qwen3Config(**SIZES, tie_word_embeddings=True),
    "gpt2": transformers.GPT2Config(**GPT),
    "gpt2, untied": transformers.GPT2Config(**GPT, tie_word_embeddings=False),
}
MORE = {
    "gemma2": transformers.Gemma2Config(**SIZES, final_logit_softcapping=3.0),
    "cohere": transformers.CohereConfig(
        **{k: v for k, v in SIZES.items() if k != "head_dim"}, logit_scale=0.5
    ),
    "granite": transformers.GraniteConfig(**SIZES, logits_scaling=4.0),
}


def base_of(config: Any) -> Base:
    torch.manual_seed(0)
    net = transformers.AutoModelForCausalLM.from_config(config).requires_grad_(False).eval()
    net.config.pad_token_id = 0
    return Base(net, None, "causal-lm", (), torch.device("cpu"), "made here", None, frozenset())


def answers(count: int = 5) -> Encoded:
    """Texts of different lengths, whose first tokens carry no loss."""
    draw = np.random.default_rng(0)
    examples = []
    for number in range(count):
        ids = draw.integers(1, 120, 9 + number).astype(np.int32)
        examples.append({"input_ids": ids, "labels": np.where(np.arange(len(ids)) < 4, -100, ids)})
    return Encoded(examples, lambda rows: collate_text([examples[n] for n in rows], 0), 6 * count)


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven rows a piece."""
    monkeypatch.setattr(loss_pieces, "PIECE", 7 * 4 * 120)


def gradients(tunable: TunableModel, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    found = torch.autograd.grad(loss, tunable.parameters())
    return dict(zip(tunable.named, found, strict=True))


@pytest.mark.parametrize("kind", ["lora", "full", "prompt"])
@pytest.mark.parametrize("name", list(PLAIN))
def test_loss_and_gradients_are_those_of_all_logits(name: str, kind: str, small_pieces: None) -> None:
    tunable = attach(base_of(PLAIN[name]), adapter_of(kind), 1)
    tunable.net.double()
    with torch.no_grad():
        for value in tunable.parameters():  # LoRA's second factors are zero
            value.add_(0.05 * torch.randn(value.shape, generator=torch.Generator().manual_seed(1)))
    batch = answers().collate(range(5))
    logits = tunable.net(**{key: batch[key] for key in ("input_ids", "attention_mask")}).logits
    logits, labels = logits[:, -batch["labels"].shape[1] : -1], batch["labels"][:, 1:]
    wanted = cross_entropy(logits.reshape(-1, 120), labels.reshape(-1), reduction="sum")
    got, none, _ = summed_loss(tunable, batch)
    assert none is None and tunable.base.logits_apart
    assert float((got - wanted).abs().detach()) < 1e-6 * float(wanted.detach())
    expected = gradients(tunable, wanted)
    for key, value in gradients(tunable, got).items():
        assert float((value - expected[key]).norm()) <= 1e-6 * float(expected[key].norm()) + 1e-9, key


@pytest.mark.parametrize("name", list(MORE))
def test_scaled_and_capped_logits_go_the_plain_way(name: str, small_pieces: None) -> None:
    tunable = attach(base_of(MORE[name]), adapter_of(), 1)
    loss, logits, labels = summed_loss(tunable, answers().collate(range(5)))
    assert tunable.base.logits_apart is False and logits is not None
    by_hand = cross_entropy(logits.reshape(-1, 120).float(), labels.reshape(-1), reduction="sum")
    assert torch.equal(loss, by_hand)


def test_logits_changed_in_place_go_the_plain_way(small_pieces: None) -> None:
    base = base_of(PLAIN["llama"])

    def halve(module: Any, given: Any, answer: Any) -> None:
        answer.logits.mul_(0.5)

    base.net.register_forward_hook(halve)
    assert not loss_pieces.logits_apart(base)


def test_asking_draws_nothing_and_leaves_the_model_as_it_is(small_pieces: None) -> None:
    tunable = attach(base_of(PLAIN["llama"]), adapter_of(dropout=0.5), 1)
    tunable.net.train()
    before = torch.get_rng_state()
    assert loss_pieces.logits_apart(tunable.base)
    assert torch.equal(torch.get_rng_state(), before)
    assert "forward" not in vars(tunable.base.net.get_output_embeddings())


def test_training_and_scores_agree_with_the_plain_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dropout too: a piece that is computed again is not another draw."""
    found = []
    for size in (256 << 20, 7 * 4 * 120):
        monkeypatch.setattr(loss_pieces, "PIECE", size)
        tunable = attach(base_of(PLAIN["llama, tied"]), adapter_of(dropout=0.1), 1)
        report = fit(tunable, answers(), TrainSettings(steps=3, batch=4, lr=1e-2), 5)
        found.append((report.loss, score(tunable, answers(), 2).loss, tunable.read()))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-5)
    for key, value in found[0][2].items():
        np.testing.assert_allclose(found[1][2][key], value, atol=2e-5)


class Widest(TorchDispatchMode):
    """The most rows of logits that any operation gave."""

    rows = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        view = func is torch.ops.aten.t.default  # of the output layer's matrix
        if isinstance(out, torch.Tensor) and not view and out.ndim and out.shape[-1] == 120:
            self.rows = max(self.rows, out.numel() // 120)
        return out


def test_no_more_logits_than_a_piece_exist_at_once(small_pieces: None) -> None:
    tunable = attach(base_of(PLAIN["llama"]), adapter_of(), 1)
    batch = answers().collate(range(5))
    summed_loss(tunable, batch)  # asks the model once
    with Widest() as seen:
        summed_loss(tunable, batch)[0].backward()
    assert seen.rows == 7

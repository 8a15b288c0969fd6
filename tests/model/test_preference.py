"""Pairs of responses: losses are TRL's formulas, padding and prompts never count, the reference is the base."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch.nn import functional

from fedtune.model import loss_pieces
from fedtune.model.base import Base, load
from fedtune.model.encode import encode
from fedtune.model.objectives import OBJECTIVES, Preference
from fedtune.model.objectives.dpo import Dpo
from fedtune.model.objectives.ipo import Ipo
from fedtune.model.objectives.orpo import Orpo
from fedtune.model.objectives.simpo import Simpo
from fedtune.model.score import score
from fedtune.model.settings import ModelSettings
from fedtune.model.training_loss import TrainingLoss, likely_pairs, pairs_of
from fedtune.model.tunable import TunableModel, attach
from fedtune.types import Tensors
from tests import tiny
from tests.tables import adapter_of

ROWS = [
    {"prompt": "the quick brown fox", "chosen": "jumps over the dog", "rejected": "a dog"},
    {"prompt": "a", "chosen": "song", "rejected": "piano plays slow and the rain falls on the roof"},
    {"prompt": "the rain", "chosen": "falls on the roof of the house", "rejected": "plays"},
]
LOSSES = [Dpo(beta=0.3), Dpo(beta=0.3, smoothing=0.1), Ipo(beta=0.4), Orpo(beta=0.2), Simpo(beta=1.5)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    folder = tiny.llama(tmp_path_factory.mktemp("llama") / "model", chat=False)
    return load(ModelSettings(name=str(folder), device="cpu", threads=1), "preference", (), 1)


@pytest.fixture
def tunable(base: Base) -> TunableModel:
    made = attach(base, adapter_of(kind="lora", rank=2), 1)
    made.write(moved(made.read()))
    return made


def moved(values: Tensors) -> dict[str, np.ndarray]:
    """An adapter that says something."""
    draw = np.random.default_rng(5)
    return {name: draw.normal(0, 0.3, value.shape).astype(np.float32) for name, value in values.items()}


def by_trl(objective: Any, chosen: Any, rejected: Any, ref_chosen: Any, ref_rejected: Any) -> torch.Tensor:
    """TRL 1.16's formulas, each (tokens,) tensor a response's log-probabilities by token:
    trl/trainer/dpo_trainer.py, `_compute_loss` ("sigmoid", "ipo"; the smoothed form is that of "aot"),
    trl/experimental/orpo/orpo_trainer.py, `odds_ratio_loss` and the cross entropy that is added to it (here of
    the response alone), trl/experimental/cpo/cpo_trainer.py, `cpo_loss` ("simpo")."""
    if objective.loss == "dpo":
        delta = (chosen.sum() - ref_chosen.sum()) - (rejected.sum() - ref_rejected.sum())
        return (
            -functional.logsigmoid(objective.beta * delta) * (1 - objective.smoothing)
            - functional.logsigmoid(-objective.beta * delta) * objective.smoothing
        )
    if objective.loss == "ipo":
        delta = (chosen - ref_chosen).mean() - (rejected - ref_rejected).mean()
        return (delta - 1 / (2 * objective.beta)) ** 2
    policy_chosen, policy_rejected = chosen.mean(), rejected.mean()
    if objective.loss == "orpo":
        log_odds = (policy_chosen - policy_rejected) - (
            torch.log1p(-torch.exp(policy_chosen)) - torch.log1p(-torch.exp(policy_rejected))
        )
        return -policy_chosen - objective.beta * functional.logsigmoid(log_odds)
    logits = policy_chosen - policy_rejected - objective.gamma / objective.beta
    return -functional.logsigmoid(objective.beta * logits)


def alone(net: Any, base: Base, row: dict[str, str], side: str) -> torch.Tensor:
    """Log-probabilities of a response's tokens by plain transformers, one text at a time, nothing padded."""
    instruct = replace(base, task="instruct")
    (example,) = encode([{"prompt": row["prompt"], "response": row[side]}], instruct, max_length=64).examples
    ids, labels = (torch.from_numpy(example[name]).long() for name in ("input_ids", "labels"))
    said = net(input_ids=ids[None], use_cache=False).logits[0, :-1].log_softmax(-1)
    there = labels[1:] != -100
    return said[there].gather(-1, labels[1:][there][:, None])[:, 0]


@pytest.mark.parametrize("objective", LOSSES, ids=lambda one: f"{one.loss}{getattr(one, 'smoothing', '')}")
def test_losses_are_trls(objective: Preference, base: Base, tunable: TunableModel) -> None:
    encoded = encode(ROWS, base, max_length=64)
    assert encoded.paired and len(encoded) == len(ROWS)
    with torch.no_grad():
        got = TrainingLoss.of(objective, tunable, encoded)(tunable, encoded.collate([0, 1, 2])).item()
        want = 0.0
        for row in ROWS:
            said = [alone(tunable.net, base, row, side) for side in ("chosen", "rejected")]
            with tunable.net.disable_adapter():
                before = [alone(tunable.net, base, row, side) for side in ("chosen", "rejected")]
            want += float(by_trl(objective, *said, *before))
    assert got == pytest.approx(want, rel=2e-5)


def test_all_losses_on_pairs_are_compared_with_trl() -> None:
    known = {name for name, one in OBJECTIVES.items() if issubclass(one, Preference)}
    assert known == {one.loss for one in LOSSES}


def test_padding_and_other_pairs_never_count(base: Base, tunable: TunableModel) -> None:
    encoded = encode(ROWS, base, max_length=64)
    with torch.no_grad():
        whole = likely_pairs(tunable, encoded.collate([0, 1, 2]))
        for row in range(3):
            one = likely_pairs(tunable, encoded.collate([row]))
            torch.testing.assert_close(whole.log_p[row : row + 1], one.log_p, rtol=1e-5, atol=1e-5)
            assert whole.tokens[row].tolist() == one.tokens[0].tolist()


def test_the_prompt_carries_no_loss(base: Base) -> None:
    encoded = encode(ROWS, base, max_length=64)
    for row, example in zip(ROWS, encoded.examples, strict=True):
        for which in ("", "rejected_"):
            ids, labels = example[f"{which}input_ids"], example[f"{which}labels"]
            said = base.tokenizer.decode(ids[labels != -100], skip_special_tokens=True)
            assert said == row["rejected" if which else "chosen"]
            assert base.tokenizer.decode(ids[labels == -100]).strip().endswith(row["prompt"])
    first = encoded.examples[0]
    shared = (first["labels"] == -100).sum()
    assert (first["input_ids"][:shared] == first["rejected_input_ids"][:shared]).all()


def test_large_vocabularies_go_in_pieces(
    base: Base, tunable: TunableModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded = encode(ROWS, base, max_length=64)
    batch = encoded.collate([0, 1, 2])
    loss = TrainingLoss.of(Dpo(), tunable, encoded)
    gradients = []
    for piece in (loss_pieces.PIECE, 4 * loss_pieces.vocabulary(base.net) * 3):
        monkeypatch.setattr(loss_pieces, "PIECE", piece)
        value = loss(tunable, dict(batch))
        gradients.append((value.item(), torch.autograd.grad(value, tunable.parameters())))
    assert gradients[0][0] == pytest.approx(gradients[1][0], rel=1e-5)
    for one, other in zip(gradients[0][1], gradients[1][1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)


def test_the_base_is_even_with_itself_and_a_trained_model_is_not(base: Base, tunable: TunableModel) -> None:
    base.judge = Dpo()
    encoded = encode(ROWS, base, max_length=64)
    trained = score(tunable, encoded)
    tunable.write({name: np.zeros_like(value) for name, value in tunable.read().items()})
    plain = score(tunable, encoded)
    assert (plain.metric, plain.margins) == (0.5, (0.0, 0.0, 0.0))
    assert plain.loss == pytest.approx(np.log(2)) and plain.count == 3 and plain.name == "accuracy"
    assert (
        trained.metric == np.mean([margin > 0 for margin in trained.margins]) and trained.loss != plain.loss
    )
    base.judge = Simpo()
    found = score(tunable, encoded, batch=1)
    assert np.sign(found.margins).tolist() == np.sign(found.per_token).tolist()


def test_a_response_that_is_cut_away_leaves_its_pair_out(base: Base) -> None:
    encoded = encode(ROWS, base, max_length=6)
    assert encoded.truncated and len(encoded) + encoded.dropped == 3
    assert all(encoded.length(number) <= 6 for number in range(len(encoded)))


def test_turns_of_the_prompt_carry_no_loss(tmp_path: Path) -> None:
    folder = tiny.llama(tmp_path / "chat")
    talking = load(ModelSettings(name=str(folder), device="cpu", threads=1), "preference", (), 1)
    asked = [
        {"role": "user", "content": "a dog"},
        {"role": "assistant", "content": "the fox"},
        {"role": "user", "content": "the rain"},
    ]
    better, worse = ([{"role": "assistant", "content": text}] for text in ("falls on", "plays"))
    rows = [{"prompt": asked, "chosen": better, "rejected": worse}]
    (example,) = encode(rows, talking, max_length=64).examples
    for which, want in (("", "falls on"), ("rejected_", "plays")):
        ids, labels = example[f"{which}input_ids"], example[f"{which}labels"]
        assert talking.tokenizer.decode(ids[labels != -100], skip_special_tokens=True).strip() == want


def test_the_reference_drops_nothing(tmp_path: Path) -> None:
    """A base with dropout has one reference, whatever the mode."""
    folder = tiny.llama(tmp_path / "llama", chat=False)
    config = transformers.GPT2Config(
        vocab_size=300, n_embd=32, n_layer=1, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=1,
        resid_pdrop=0.5,
    )  # fmt: skip
    tiny.save(transformers.GPT2LMHeadModel, config, folder)
    dropping = load(ModelSettings(name=str(folder), device="cpu", threads=1), "preference", (), 1)
    tunable = attach(dropping, adapter_of(kind="lora", rank=2), 1)
    encoded = encode(ROWS, dropping, max_length=32)
    batch = encoded.collate([0, 1])
    tunable.net.train()
    references = [pairs_of(Dpo(), tunable, dict(batch))[1] for _ in range(2)]
    assert tunable.net.training
    assert references[0] is not None and references[1] is not None
    torch.testing.assert_close(references[0].log_p, references[1].log_p, rtol=0, atol=0)

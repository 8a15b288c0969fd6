"""What is altered of a client's inputs is its formula, never padding, prompts or labels; nothing where it is idle,
and nothing when scored."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedtune.errors import FedtuneError
from fedtune.model.changed_inputs import ChangedInputs
from fedtune.model.encode import encode
from fedtune.model.input_changes import INPUT_CHANGES, InputChange, Vocabulary
from fedtune.model.input_changes.masked_thought import MaskedThought
from fedtune.model.input_changes.neftune import Neftune
from fedtune.model.objectives import CrossEntropy
from fedtune.model.training_loss import TrainingLoss
from fedtune.model.tunable import attach
from fedtune.rng import stream
from tests import small, tiny
from tests.tables import adapter_of

IDLE: dict[str, dict[str, Any]] = {
    "neftune": {"alpha": 0.0},
    "masked-thought": {"probability": 0.0, "token": "random"},
}
AWAKE: dict[str, dict[str, Any]] = {
    "neftune": {"alpha": 5.0},
    "masked-thought": {"probability": 0.9, "token": "random"},
}
CAUSAL: dict[str, Any] = {"data__task": "causal-lm", "data__max_length": 24}


def test_every_change_is_enrolled() -> None:
    assert IDLE.keys() == AWAKE.keys() == INPUT_CHANGES.keys()


def test_noise_is_its_formula() -> None:
    """Uniform between -1 and 1, times alpha / sqrt(L d)."""
    noise = Neftune(alpha=7.0).noise(6, 50, stream("noise", 1)).astype(np.float64)
    even = stream("noise", 1).random((6, 50), np.float32).astype(np.float64) * 2 - 1
    np.testing.assert_allclose(noise, even * 7.0 / math.sqrt(6 * 50), rtol=1e-5)
    assert abs(noise).max() <= 7.0 / math.sqrt(300) and abs(noise.mean()) < 0.05


class Words:
    """What a tokenizer says of itself."""

    mask_token_id = 3
    all_special_ids = (0, 1, 3)
    added_tokens_decoder: dict[int, str] = {}  # noqa: RUF012

    @staticmethod
    def get_vocab() -> dict[str, int]:
        return {f"<{number}>": number for number in range(40)}


@pytest.mark.parametrize(("share", "expected"), [(0.0, 0.0), (1 / 3, 0.2), (2 / 3, 0.4), (1.0, 0.4)])
@pytest.mark.parametrize("token", ["mask", "random", "<7>"])
def test_the_probability_rises_over_two_thirds_of_the_run(token: str, share: float, expected: float) -> None:
    ids, answered = np.arange(20_000) % 37 + 4, np.arange(20_000) % 2 == 1
    ids[ids == 7] = 8
    change = MaskedThought(probability=0.4, token=token)
    said = change.tokens(ids, answered, share, stream("tokens", 2), Vocabulary(Words()))
    other = said != ids
    assert not other[~answered].any()  # a prompt is read as it is
    assert other[answered].mean() == pytest.approx(expected, abs=0.02)
    instead = set(said[other].tolist())
    if expected:
        assert instead == {"mask": {3}, "<7>": {7}}.get(token, instead)
        assert not instead & {0, 1} and (token != "random" or len(instead) > 30)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """A tiny Llama and prompts with responses of different lengths."""
    from fedtune.model.base import load
    from fedtune.model.settings import ModelSettings

    base = load(
        ModelSettings(name=str(tiny.llama(tmp_path_factory.mktemp("m") / "llama"))), "instruct", (), 1
    )
    rows = [{"prompt": "the fox runs", "response": " " + " ".join(["song"] * n)} for n in (2, 9, 5)]
    return attach(base, adapter_of(kind="lora", rank=2), 1), encode(rows, base, max_length=32)


def test_prompts_padding_and_labels_stay(tuned: tuple[Any, Any]) -> None:
    tunable, encoded = tuned
    change = MaskedThought(probability=0.9, token="random")
    read = ChangedInputs.of([change], tunable, 5).at(encoded, 3, 1.0)
    plain, changed = encoded.collate([0, 1, 2]), read.collate([0, 1, 2])
    for name in ("labels", "attention_mask"):
        assert torch.equal(plain[name], changed[name])
    other = plain["input_ids"] != changed["input_ids"]
    assert other.any() and not other[plain["labels"] == -100].any()
    alone = read.collate([1])["input_ids"][0]  # what is drawn does not depend on the batch
    assert torch.equal(changed["input_ids"][1, : len(alone)], alone)
    later = ChangedInputs.of([change], tunable, 5).at(encoded, 4, 1.0).collate([0, 1, 2])
    assert not torch.equal(later["input_ids"], changed["input_ids"])


def test_noise_is_added_to_what_is_there(tuned: tuple[Any, Any]) -> None:
    """The embeddings that the network reads, against the formula row by row; padding gets none."""
    tunable, encoded = tuned
    inputs = ChangedInputs.of([Neftune(alpha=6.0)], tunable, 5)
    batch, seen = inputs.at(encoded, 0, 0.0).collate([0, 1, 2]), list[torch.Tensor]()
    module = tunable.base.net.get_input_embeddings()
    loss_of = TrainingLoss.of(CrossEntropy(), tunable, encoded)
    before = loss_of(tunable, encoded.collate([0, 1, 2])).item()

    def look(tunable: Any, rest: Any) -> torch.Tensor:
        handle = module.register_forward_hook(lambda m, i, said: seen.append(said.detach()))
        try:
            return loss_of(tunable, rest)
        finally:
            handle.remove()

    noisy = inputs.around(look)(tunable, batch).item()
    assert noisy == inputs.around(look)(tunable, batch).item() != before  # the same however often it is asked
    assert loss_of(tunable, encoded.collate([0, 1, 2])).item() == before  # nothing is left behind
    noise = (seen[0] - module(batch["input_ids"])).detach().double().numpy()
    shown = batch["attention_mask"].numpy() > 0
    assert not noise[~shown].any()
    for place in range(3):
        own = noise[place, shown[place]]
        assert 0.9 < abs(own).max() * math.sqrt(own.size) / 6.0 <= 1.001


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.write_rows(tmp_path_factory.mktemp("data"))


def end(model: Path, data: Path, root: Path, inputs: Sequence[dict[str, Any]], **more: Any) -> str:
    tree = small.tree(model, data, rounds=2, **{"partition__clients": 2, **CAUSAL, **more})
    tree["method"].setdefault("train", {})["inputs"] = list(inputs)
    return str(small.play(small.config.parse(tree), root)[1]["state_sha256"])


KSEED: dict[str, Any] = {
    "type": "fedkseed",
    "estimator": "spsa",
    "steps": 3,
    "batch": 4,
    "size": 32,
    "lr": 1e-2,
}


@pytest.mark.parametrize("method", ["fedpeft", "fedkseed"])
def test_idle_is_the_plain_run_to_the_bit(method: str, tiny_llama: Path, data: Path, tmp_path: Path) -> None:
    def more() -> dict[str, Any]:
        return {"method": dict(KSEED)} if method == "fedkseed" else {}

    plain = end(tiny_llama, data, tmp_path / "plain", [], **more())
    idle = [{"input": name, **table} for name, table in IDLE.items()]
    assert end(tiny_llama, data, tmp_path / "idle", idle, **more()) == plain
    found = {end(tiny_llama, data, tmp_path / n, [{"input": n, **t}], **more()) for n, t in AWAKE.items()}
    assert len(found | {plain}) == 3


def test_a_mask_token_is_found_at_load_or_refused(tiny_llama: Path, data: Path, tmp_path: Path) -> None:
    for token, said in (("mask", "no mask token"), ("<never>", "no token '<never>'")):
        with pytest.raises(FedtuneError, match=said) as caught:
            end(tiny_llama, data, tmp_path / token, [{"input": "masked-thought", "token": token}])
        assert caught.value.code == "C104"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"method__train__inputs": [{"input": "masked-thought"}]}, "data.task = 'classify'"),
        ({"method__train__inputs": [{"input": "neftune"}, {"input": "neftune"}]}, "twice"),
        ({"method__train__inputs": [{"input": "neftune", "alpha": -1.0}]}, "alpha"),
        (
            {
                "method__train__inputs": [{"input": "neftune"}],
                "method__train__private": {"max_grad_norm": 1.0, "noise_multiplier": 4.0, "sample_rate": 0.1},
            },
            "inputs as they are",
        ),
        (
            {"method": {"type": "sfprompt", "tail": 1, "train": {"inputs": [{"input": "neftune"}]}}},
            "a split model",
        ),
    ],
)
def test_what_means_nothing_is_refused(
    changes: dict[str, Any], said: str, tiny_bert: Path, data: Path
) -> None:
    with pytest.raises(FedtuneError, match=said):
        small.recipe(tiny_bert, data, **changes)


def test_masked_thought_looks_at_the_rounds_of_a_run() -> None:
    from fedtune.model.settings import TrainSettings

    assert TrainSettings(inputs=(MaskedThought(),)).depends_on_rounds()
    assert not TrainSettings(inputs=(Neftune(), MaskedThought(probability=0.0))).depends_on_rounds()
    assert issubclass(MaskedThought, InputChange)

"""A steered model is the sum of three sets of logits, in scores and token by token, whatever the small one's adapter."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch.nn.functional import cross_entropy, kl_div

from fedtune.errors import FedtuneError
from fedtune.experts.routers import Routing, router
from fedtune.experts.trained import put_on, take_off
from fedtune.model.generate import Question, ends, generated, questions
from fedtune.model.likelihood import base_alone
from fedtune.model.score import score
from fedtune.model.steering import MOST, TOKENS, matched, steered
from fedtune.model.tunable import TunableModel, attach, without
from fedtune.rng import stream
from tests import tiny
from tests.marks import mostly_thorough
from tests.tables import adapter_of
from tests.tunables import bare

ROWS = [
    {"prompt": " ".join(sentence.split()[: 2 + n % 3]), "response": " ".join(sentence.split()[4:])}
    for n, sentence in enumerate(tiny.SENTENCES[:5])
]


@pytest.fixture(scope="module")
def big(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another Llama, wider and deeper, with the small one's tokenizer and eight rows of embeddings more."""
    folder = tmp_path_factory.mktemp("big")
    shutil.copytree(tiny_llama, folder, dirs_exist_ok=True)
    config = transformers.LlamaConfig.from_pretrained(tiny_llama)
    config.vocab_size, config.hidden_size, config.num_hidden_layers = config.vocab_size + 8, 48, 3
    config.head_dim = 12
    return tiny.save(transformers.LlamaForCausalLM, config, folder)


def tuned(base: Any, kind: str = "lora", drawn: int = 0) -> TunableModel:
    """An adapter with other values than the first ones, so that it changes what the model says."""
    tunable = attach(base, adapter_of(kind=kind), 1)
    draw = stream("steering", drawn)
    tunable.write(
        {
            name: value + draw.normal(0, 0.15, value.shape).astype(np.float32)
            for name, value in tunable.read().items()
        }
    )
    return tunable


def with_experts(base: Any) -> TunableModel:
    experts = {name: tuned(base, drawn=number).read() for number, name in enumerate(("law", "care"), 1)}
    tunable = tuned(base)
    put_on(tunable, router(experts, {}, Routing("arrow", "topk", k=1), causal=True))
    return tunable


@pytest.fixture
def instructed(workspace: Any) -> Iterator[TunableModel]:
    tunable = tuned(workspace.base("instruct"))
    yield tunable
    take_off(tunable)


def asked(tunable: TunableModel) -> list[Question]:
    return questions(ROWS, tunable, "auto")


def test_weight_0_is_the_big_model_to_the_bit(instructed: TunableModel, big: Path, workspace: Any) -> None:
    model, encoded = steered(instructed, str(big), 0.0), workspace.encoded("instruct")
    got, said = score(model, encoded, 3), generated(model, asked(instructed), 6, 2)
    model.base.attached = None
    alone = bare(model.base)
    assert got == score(alone, encoded, 3)
    assert said == generated(alone, asked(instructed), 6, 2)
    assert said != generated(instructed, asked(instructed), 6, 2)


KINDS = ["lora", "layernorm", "prompt", "prefix", "full", "experts"]


@pytest.mark.parametrize("kind", mostly_thorough(KINDS, ["lora", "prefix", "experts"]))
def test_the_small_base_steered_by_itself_is_the_tuned_model(workspace: Any, kind: str) -> None:
    base, encoded = workspace.base("instruct"), workspace.encoded("instruct")
    tunable = with_experts(base) if kind == "experts" else tuned(base, kind)
    try:
        want, plain = score(tunable, encoded, 3), generated(tunable, asked(tunable), 6, 2)
        model = steered(tunable, base.name, 1.0)
        assert score(model, encoded, 3).loss == pytest.approx(want.loss, abs=1e-5)
        assert generated(model, asked(tunable), 6, 2) == plain
        assert matched(model, encoded.examples) == pytest.approx(1, abs=2e-3)
        assert score(tunable, encoded, 3) == want  # it came back as it was
        with base_alone(tunable) as untuned:
            assert generated(untuned, asked(tunable), 6, 2) != plain
    finally:
        take_off(tunable)


def by_hand(logits_of: Any, tunable: TunableModel, prompt: list[int], tokens: int = 6) -> str:
    """The likeliest token again and again, the whole text read anew each time."""
    ids = list(prompt)
    for _ in range(tokens):
        with torch.no_grad():
            ids.append(int(logits_of(torch.tensor([ids])).argmax()))
        if ids[-1] in ends(tunable):
            break
    said: str = tunable.base.tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True)
    return said.strip()


def summed(tunable: TunableModel, net: Any, weight: float) -> Any:
    """The formula, with stock transformers for the big model and no cache."""
    height = tunable.base.net.config.vocab_size

    def logits(ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            added = tunable.net(input_ids=ids, use_cache=False).logits
            with without(tunable):
                added = added - tunable.base.net(input_ids=ids, use_cache=False).logits
            all_of_big: torch.Tensor = net(input_ids=ids, use_cache=False).logits
        all_of_big[..., :height] += weight * added
        return all_of_big

    return logits


def test_batches_with_caches_say_what_the_formula_says(instructed: TunableModel, big: Path) -> None:
    net = transformers.AutoModelForCausalLM.from_pretrained(big).eval()
    model = steered(instructed, str(big), 1.5)
    logits = summed(instructed, net, 1.5)
    want = [by_hand(lambda ids: logits(ids)[0, -1], instructed, one.tokens) for one in asked(instructed)]
    assert len(set(want)) > 1 and len({len(one.tokens) for one in asked(instructed)}) > 1
    for batch in (1, 2, 5):
        assert generated(model, asked(instructed), 6, batch) == want


def test_scores_are_of_the_formula(instructed: TunableModel, big: Path, workspace: Any) -> None:
    net = transformers.AutoModelForCausalLM.from_pretrained(big).eval()
    encoded, logits = workspace.encoded("instruct"), summed(instructed, net, 0.7)
    got = score(steered(instructed, str(big), 0.7), encoded, 4)
    total = 0.0
    for one in encoded.examples:
        ids, labels = (torch.tensor(np.asarray(one[key], np.int64)) for key in ("input_ids", "labels"))
        total += float(cross_entropy(logits(ids[None])[0, :-1], labels[1:], reduction="sum"))
    assert got.loss == pytest.approx(total / got.count, abs=1e-5)


def test_the_weight_moves_the_big_model_as_far_as_tuning_moved_the_small_one(
    instructed: TunableModel, big: Path, workspace: Any
) -> None:
    net = transformers.AutoModelForCausalLM.from_pretrained(big).eval()
    encoded = workspace.encoded("instruct")
    weight = matched(steered(instructed, str(big), 0.0), encoded.examples)
    assert 0.05 < weight < MOST - 0.05
    steps = {"small": 0.0, "big": 0.0}
    tokens = 0
    for one in encoded.examples:
        ids, labels = (torch.tensor(np.asarray(one[key], np.int64)) for key in ("input_ids", "labels"))
        at = (labels[1:] != -100).nonzero().flatten()[:TOKENS]
        with torch.no_grad():
            after = instructed.net(input_ids=ids[None]).logits[0, at].double().log_softmax(-1)
            with without(instructed):
                before = instructed.base.net(input_ids=ids[None]).logits[0, at].double().log_softmax(-1)
            plain = net(input_ids=ids[None]).logits[0, at].double().log_softmax(-1)
        moved = summed(instructed, net, weight)(ids[None])[0, at].double().log_softmax(-1)
        steps["small"] += float(kl_div(before, after, reduction="sum", log_target=True))
        steps["big"] += float(kl_div(plain, moved, reduction="sum", log_target=True))
        tokens += len(at)
    assert steps["big"] / tokens == pytest.approx(steps["small"] / tokens, rel=1e-3)


def test_other_vocabularies_are_refused(instructed: TunableModel, big: Path, tmp_path: Path) -> None:
    """By what ids mean, and by how a text becomes ids: sizes are the same here."""

    def changed(name: str, change: Any) -> str:
        folder = tmp_path / name
        shutil.copytree(big, folder)
        known = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        change(known)
        (folder / "tokenizer.json").write_text(json.dumps(known), encoding="utf-8")
        return str(folder)

    def swap(known: Any) -> None:
        ids = known["model"]["vocab"]
        first, second = sorted(ids, key=ids.__getitem__)[-2:]
        ids[first], ids[second] = ids[second], ids[first]

    def reverse(known: Any) -> None:
        known["model"]["merges"].reverse()

    with pytest.raises(
        FedtuneError, match=r"M303: found token '.+' as \d+ in .*swapped, expected \d+, as in"
    ):
        steered(instructed, changed("swapped", swap), 1.0)
    with pytest.raises(FedtuneError, match=r"M303: found a tokenizer of .* that cuts texts otherwise"):
        steered(instructed, changed("merges", reverse), 1.0)
    with pytest.raises(FedtuneError, match=r"M301: found no usable model at .*nothing.*correct --steer"):
        steered(instructed, str(tmp_path / "nothing"), 1.0)


def test_a_classifier_steers_nothing(workspace: Any, big: Path) -> None:
    with pytest.raises(FedtuneError, match=r"M306: found --steer with a model of data\.task = 'classify'"):
        steered(tuned(workspace.base("decoder")), str(big), 1.0)

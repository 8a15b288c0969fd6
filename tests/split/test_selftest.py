"""A wrong part is refused before training, in one sentence."""

from __future__ import annotations

import copy
import json

import pytest
import torch

from fedtune.errors import FedtuneError
from fedtune.split import selftest
from fedtune.split.cut import Cut
from fedtune.split.parts import Part
from tests.split.families import NAMED, make


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("name", NAMED)
def test_the_right_part_passes_through_json(name: str) -> None:
    card = json.loads(json.dumps(selftest.make(Part(make(name), Cut(1, 3)))))
    selftest.check(Part(make(name), Cut(1, 3)), card)
    assert set(card) >= {"head", "body", "tail", "k", "m"} and len(card["body"]["sha256"]) == 64


def test_a_part_in_half_precision_is_checked_by_its_answers() -> None:
    card = selftest.make(Part(make("llama"), Cut(1, 3)))
    selftest.check(Part(make("llama").to(torch.bfloat16), Cut(1, 3)), card)
    shifted = make("llama").to(torch.bfloat16)
    shifted.model.layers[1], shifted.model.layers[2] = shifted.model.layers[2], shifted.model.layers[1]
    with pytest.raises(FedtuneError, match="S702: found a body whose answer"):
        selftest.check(Part(shifted, Cut(1, 3)), card)


def test_other_layers_are_refused() -> None:
    card = selftest.make(Part(make("bert"), Cut(1, 3)))
    with pytest.raises(FedtuneError, match="S702: found a part with k = 2, expected k = 1"):
        selftest.check(Part(make("bert"), Cut(2, 3)), card)
    net = make("bert")
    net.bert.encoder.layer[1] = copy.deepcopy(net.bert.encoder.layer[3])
    with pytest.raises(FedtuneError, match="S702: found a body whose answer"):
        selftest.check(Part(net, Cut(1, 3)), card)
    with pytest.raises(FedtuneError, match="S702: found a part with model"):
        selftest.check(Part(make("roberta"), Cut(1, 3)), card)


def test_another_revision_is_refused_even_where_its_answer_is_close() -> None:
    card = selftest.make(Part(make("llama"), Cut(1, 3)))
    net = make("llama")
    with torch.no_grad():
        net.model.layers[1].mlp.up_proj.weight[0, 0] += 1e-6
    with pytest.raises(FedtuneError, match="S702: found a body whose tensors have digest"):
        selftest.check(Part(net, Cut(1, 3)), card)


def test_right_weights_with_wrong_buffers_are_refused() -> None:
    """The trap of loading by hand: rotary frequencies are in no file, and a part with others computes
    something else."""
    card = selftest.make(Part(make("gpt_neox"), Cut(1, 3)))
    net = make("gpt_neox")
    net.gpt_neox.rotary_emb.inv_freq.mul_(1.5)
    with pytest.raises(FedtuneError, match="S702: found a body whose answer"):
        selftest.check(Part(net, Cut(1, 3)), card)


def test_a_body_behind_a_wire_is_asked_with_the_canary() -> None:
    part = Part(make("vit"), Cut(1, 3))
    card = selftest.make(part)
    hidden, side = selftest.canary(card)
    answer = part.body(hidden, side)
    selftest.verify(card, "body", answer.half().float(), torch.float16)
    for bad in (answer * float("nan"), answer.flip(2), answer[:, 1:]):
        with pytest.raises(FedtuneError, match="S702"):
            selftest.verify(card, "body", bad, torch.float16)


def test_a_fresh_task_head_is_left_out_of_the_digest() -> None:
    fresh = frozenset({"classifier.weight", "classifier.bias"})
    card = selftest.make(Part(make("bert"), Cut(1, 3), fresh=fresh))
    net = make("bert")
    with torch.no_grad():
        net.classifier.weight.add_(1.0)
    selftest.check(Part(net, Cut(1, 3), fresh=fresh), card)
    with pytest.raises(FedtuneError, match="S702: found a tail whose tensors"):
        selftest.check(Part(net, Cut(1, 3)), card)

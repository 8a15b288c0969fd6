"""Self-contrast of experts: the formula with two routers and no cache, whatever the gate reads."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from fedtune.errors import FedtuneError
from fedtune.experts.feed_forward import blocks
from fedtune.experts.gates import Gate
from fedtune.experts.routers import PREFIX, Router, Routing, router
from fedtune.experts.trained import put_on, take_off
from fedtune.model.contrast import ALPHA, contrasted
from fedtune.model.generate import Question, ends, generated, questions
from fedtune.model.score import score
from fedtune.model.tunable import TunableModel, attach
from fedtune.rng import stream
from tests import tiny
from tests.tables import adapter_of

NAMES = "abcd"
ROWS = [
    {"prompt": " ".join(sentence.split()[: 2 + n % 3]), "response": " ".join(sentence.split()[4:])}
    for n, sentence in enumerate(tiny.SENTENCES[:5])
]
Expert = dict[str, np.ndarray]


def experts(tunable: TunableModel, end: str) -> dict[str, Expert]:
    return {
        name: {
            tensor: np.float32(stream(f"{name} {tensor}", 1).normal(0, 0.3, value.shape))
            for tensor, value in tunable.read().items()
            if end in tensor
        }
        for name in NAMES
    }


def made(tunable: TunableModel, per: Any, some: dict[str, Expert], keep: Any = "topk", k: int = 2) -> Router:
    """A drawn gate at each layer or block, of prefixes or of single tokens."""
    sizes = {
        name.removeprefix(PREFIX).removesuffix(".lora_B.weight"): (
            some["a"][name.replace("lora_B", "lora_A")].shape[1],
            value.shape[0],
        )
        for name, value in some["a"].items()
        if "lora_B" in name
    }
    gates = {}
    for layer in blocks(sizes).values() if per == "block" else sizes:
        draw = stream(f"gate {layer}", 1)
        weight, bias = draw.normal(size=(len(NAMES), sizes[layer][0])), draw.normal(size=len(NAMES))
        rows = [NAMES.index(name) for name in sorted(some)]
        gates[layer] = Gate(
            torch.from_numpy(np.float32(weight[rows])),
            torch.from_numpy(np.float32(bias[rows])),
            of_prefix=per == "layer",
        )
    return router(some, {}, Routing("trained", keep, k, 0.6, per=per), True, gates=gates)


@pytest.fixture(params=["layer", "block"])
def routed(workspace: Any, request: pytest.FixtureRequest) -> Iterator[TunableModel]:
    tunable = attach(workspace.base("instruct"), adapter_of(kind="lora"), 1)
    put_on(
        tunable, made(tunable, request.param, experts(tunable, ".mlp." if request.param == "block" else ""))
    )
    yield tunable
    take_off(tunable)


def asked(tunable: TunableModel) -> list[Question]:
    return questions(ROWS, tunable, "auto")


def by_formula(tunable: TunableModel, beta: float, ids: torch.Tensor, masked: bool) -> torch.Tensor:
    """Two routers, one after the other, over the whole text, without a cache."""
    strong_router, said = tunable.routed, []
    for keep, k in (("topk", 2), ("rank", 3)):
        other = Router(
            strong_router.names,
            Routing("trained", keep, k, per=strong_router.routing.per),
            strong_router.layers,
            True,
        )
        put_on(tunable, other)
        with torch.no_grad():
            said.append(tunable.net(input_ids=ids, use_cache=False).logits.double())
    put_on(tunable, strong_router)
    strong, weak = said
    logits = (1 + beta) * strong - beta * weak
    least = strong.softmax(-1).amax(-1, keepdim=True) * ALPHA
    return logits.masked_fill(strong.softmax(-1) < least, -math.inf) if masked else logits


def test_a_weight_of_0_is_the_run_to_the_bit(routed: TunableModel, workspace: Any) -> None:
    encoded = workspace.encoded("instruct")
    want = score(routed, encoded, 3), generated(routed, asked(routed), 6, 2)
    model = contrasted(routed, 0.0)
    assert (score(model, encoded, 3), generated(model, asked(routed), 6, 2)) == want


def test_scores_are_of_the_formula(routed: TunableModel, workspace: Any) -> None:
    encoded, total = workspace.encoded("instruct"), 0.0
    plain = score(routed, encoded, 4)
    got = score(contrasted(routed, 0.7), encoded, 4)
    for one in encoded.examples:
        ids, labels = (torch.tensor(np.asarray(one[key], np.int64)) for key in ("input_ids", "labels"))
        logits = by_formula(routed, 0.7, ids[None], masked=False)
        total += float(cross_entropy(logits[0, :-1], labels[1:], reduction="sum"))
    assert got.loss == pytest.approx(total / got.count, abs=1e-5) and abs(got.loss - plain.loss) > 1e-3
    assert score(routed, encoded, 4) == plain  # it came back as it was


def test_answers_with_two_caches_are_of_the_formula(routed: TunableModel) -> None:
    want = []
    for one in asked(routed):
        ids = list(one.tokens)
        for _ in range(6):
            ids.append(int(by_formula(routed, 1.5, torch.tensor([ids]), masked=True)[0, -1].argmax()))
            if ids[-1] in ends(routed):
                break
        said: str = routed.base.tokenizer.decode(ids[len(one.tokens) :], skip_special_tokens=True)
        want.append(said.strip())
    model = contrasted(routed, 1.5)
    for batch in (1, 2, 5):
        assert generated(model, asked(routed), 6, batch) == want
    assert want != generated(routed, asked(routed), 6, 5)


def test_equal_experts_have_nothing_to_contrast_and_their_order_is_nothing(
    routed: TunableModel, workspace: Any
) -> None:
    encoded, per = workspace.encoded("instruct"), routed.routed.routing.per
    some = experts(routed, ".mlp." if per == "block" else "")
    want = score(contrasted(routed, 0.5), encoded, 3).loss
    put_on(routed, made(routed, per, {name: some[name] for name in reversed(NAMES)}))
    assert score(contrasted(routed, 0.5), encoded, 3).loss == want
    put_on(routed, made(routed, per, dict.fromkeys(NAMES, some["a"])))
    alike = score(contrasted(routed, 2.0), encoded, 3)
    assert alike.loss == pytest.approx(score(routed, encoded, 3).loss, abs=1e-5)


def test_the_weak_one_is_the_first_that_is_left_out_or_the_last() -> None:
    scores = torch.tensor([[1.0, 4.0, 2.0, 3.0]])
    for k, place in ((1, 1), (2, 3), (3, 2), (4, 0), (9, 0)):
        part, kept, shares = Routing(keep="rank", k=k).parts(scores)
        assert shares.tolist() == kept.tolist() and int(kept.argmax()) == place and float(kept.sum()) == 1
        assert float(part.sum()) == pytest.approx(1)


def test_a_model_without_experts_and_a_classifier_are_refused(workspace: Any) -> None:
    plain = attach(workspace.base("instruct"), adapter_of(kind="lora"), 1)
    with pytest.raises(
        FedtuneError, match="M306: found --steer self for a model without experts behind a gate"
    ):
        contrasted(plain, 0.5)
    with pytest.raises(FedtuneError, match=r"M306: found --steer with a model of data\.task = 'classify'"):
        contrasted(attach(workspace.base("decoder"), adapter_of(kind="lora"), 1), 0.5)

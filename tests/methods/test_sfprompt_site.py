"""A site that loads head and tail alone has the tunable model of the whole model, and a part that is not the
coordinator's is refused."""

from __future__ import annotations

import gc
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedtune.aggregate import Mean
from fedtune.errors import FedtuneError
from fedtune.methods.sfprompt import SFPromptTable
from fedtune.methods.sfprompt_work import Share
from fedtune.model.base import Base, load
from fedtune.model.encode import encode
from fedtune.model.fit import step_batches
from fedtune.model.settings import ModelSettings
from fedtune.model.tunable import TunableModel
from fedtune.schema import Schema, digest
from fedtune.split.body import Frozen
from fedtune.split.body_address import BodyAddress
from fedtune.split.channel import Local
from fedtune.split.facts import SplitFacts
from fedtune.split.service import Service
from fedtune.split.session import Offer
from tests import tiny

LABELS = ("a", "b")
CASES = [
    ("encoder", {}),
    ("encoder", {"head": 0, "tail": 1}),
    ("encoder", {"lora_rank": 2}),
    ("images", {}),
    ("decoder", {}),
    ("causal", {}),
    ("images", {"position": "input", "head": 0, "slim": "off"}),
]


def method_of(**changes: Any) -> Any:
    settings = {
        "type": "sfprompt",
        "prompts": 3,
        "codec": "fp32",
        "train": {"batch": 2, "accumulate": 2, "steps": 1},
        **changes,
    }
    return SFPromptTable(**settings).build(3, Mean())


def parted(method: Any, model: ModelSettings, task: str) -> tuple[Base, Base, Any, Any]:
    """The whole model, a site's part of it, and the tunable model of each."""
    labels = () if task == "causal-lm" else LABELS
    whole = load(model, task, labels, 1)
    tunable = method.prepare(whole, 1)
    split = method.capabilities.split
    site = split.load_site(
        model,
        task,
        labels,
        1,
        SplitFacts.from_words(json.loads(json.dumps(split.describe(tunable).to_words()))),
    )
    return whole, site, tunable, method.prepare(site, 1)


@pytest.mark.parametrize(("name", "changes"), CASES, ids=str)
def test_a_site_has_the_bench_of_the_whole_model_and_no_block_of_the_body(
    name: str, changes: dict[str, Any], workspace: Any
) -> None:
    method, model, task = method_of(**changes), workspace.settings(name), workspace.tasks[name]
    whole, site, tunable, own = parted(method, model, task)
    assert Schema.of(own.named) == Schema.of(tunable.named) and digest(own.read()) == digest(tunable.read())
    assert site.fingerprint == whole.fingerprint
    body = tunable.net.part.parameters("body")
    assert body and site.size == whole.size - sum(value.numel() for value in body.values())
    assert not site.weights.keys() & body.keys()
    with pytest.raises(FedtuneError, match="S711: this site has only head and tail of the model"):
        own.net.own_body  # noqa: B018  # a property


def test_half_precision_and_a_tied_vocabulary(workspace: Any, tmp_path: Path) -> None:
    """The vocabulary's matrix is in the site's memory once, and frozen, as in the whole model."""
    tied = ModelSettings(name=str(tiny.llama(tmp_path, tie=True)), threads=1, device="cpu")
    for model, task in ((workspace.settings("encoder", dtype="bfloat16"), "classify"), (tied, "causal-lm")):
        whole, site, tunable, own = parted(method_of(), model, task)
        assert Schema.of(own.named) == Schema.of(tunable.named) and digest(own.read()) == digest(
            tunable.read()
        )
        assert site.size == whole.size - sum(
            value.numel() for value in tunable.net.part.parameters("body").values()
        )
    assert list(own.named) == ["model.norm.weight", "prompts"]
    assert site.net.lm_head.weight is site.net.model.embed_tokens.weight


@pytest.mark.parametrize(("name", "changes"), CASES, ids=str)
def test_loss_and_gradients_are_those_of_the_whole_model(
    name: str, changes: dict[str, Any], workspace: Any
) -> None:
    """The site's steps go through a body that was loaded alone, the whole model's through its own."""
    method, model, task = method_of(**changes), workspace.settings(name), workspace.tasks[name]
    _, site, tunable, own = parted(method, model, task)
    facts = method.capabilities.split.describe(tunable)
    offer, card = facts.offer, facts.read_card()
    part = method.capabilities.split.load_body(model, task)
    assert part.net is not site.net and not {"head", "tail"} & part.holds
    service = Service(Frozen(part), replace(offer, model=""), lambda hello, peer: True, merging=None)
    far = BodyAddress(lambda: Local(service), offer, "here", lambda number, client: "", card)
    found = [a_step(method, one, body) for one, body in ((tunable, tunable.net.own_body), (own, far))]
    assert found[0][0] == found[1][0] != 0
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True)) and any(
        bool(a.any()) for a in found[0][1]
    )


def a_step(method: Any, tunable: TunableModel, body: BodyAddress) -> tuple[float, list[torch.Tensor]]:
    """Loss and gradients of the first step of a client with six examples."""
    task = tunable.base.task
    data = encode(tiny.images() if task == "image-classify" else tiny.texts(), tunable.base, max_length=16)
    micro = next(iter(step_batches(len(data), method.settings.train, 5)))
    session = body.open(1, 0, tunable.net.wishes())
    share = Share(tunable, data, method.settings, session, 5, (0, 3))
    loss = share.through_body(range(len(data)))(micro, [data.collate(numbers) for numbers in micro], 4)
    session.close()
    return loss, [
        value.grad.clone() if value.grad is not None else torch.zeros(1) for value in tunable.parameters()
    ]


def test_a_telling_bench_stays_as_it_is(workspace: Any) -> None:
    """The card is of the pretrained weights, whatever was trained since."""
    for changes in ({"tail": 1, "head": 0}, {"lora_rank": 2}):
        method = method_of(**changes)
        tunable = method.prepare(workspace.load("encoder"), 1)
        first = method.capabilities.split.describe(tunable)
        tunable.write({name: value + 1 for name, value in tunable.read().items()})
        before, batch = digest(tunable.read()), workspace.encoded("encoder").collate(range(3))
        logits = tunable.net(**{name: value for name, value in batch.items() if name != "labels"}).logits
        assert method.capabilities.split.describe(tunable) == first and digest(tunable.read()) == before
        assert torch.equal(
            tunable.net(**{name: value for name, value in batch.items() if name != "labels"}).logits, logits
        )
        assert (
            all(value.requires_grad for value in tunable.parameters())
            and sum(v.requires_grad for v in tunable.base.net.parameters()) >= len(tunable.named) - 1
        )


# --- what is refused ---


def test_a_part_that_is_not_the_coordinators_is_refused_before_training(
    workspace: Any, tmp_path: Path
) -> None:
    import transformers

    method = method_of()
    told = method.capabilities.split.describe(method.prepare(workspace.load("encoder"), 1))
    other = tiny.bert(tmp_path / "other")
    net = transformers.BertModel.from_pretrained(other)
    with torch.no_grad():
        net.encoder.layer[0].output.dense.weight[0, 0] += (
            1e-6  # another revision, and an answer that nobody could tell apart
        )
    net.save_pretrained(other)
    here = ModelSettings(name=str(other), threads=1, device="cpu")
    with pytest.raises(FedtuneError, match="S702: found a head whose tensors have digest"):
        method.capabilities.split.load_site(here, "classify", LABELS, 1, told)
    with pytest.raises(FedtuneError, match="S702: found a part with k = 0, expected k = 1"):
        method_of(head=0).capabilities.split.load_site(
            workspace.settings("encoder"), "classify", LABELS, 1, told
        )
    with pytest.raises(FedtuneError, match="S702: found a tokenizer of digest"):
        method.capabilities.split.load_site(
            workspace.settings("encoder"), "classify", LABELS, 1, replace(told, tokenizer="0" * 64)
        )


@pytest.mark.parametrize(
    "spoiled", [{}, {"card": "["}, {"card": "{}"}, {"card": '{"k": "1"}'}, {"base": ""}], ids=str
)
def test_a_ticket_that_describes_no_parts_is_refused(spoiled: dict[str, str], workspace: Any) -> None:
    method = method_of()
    told = method.capabilities.split.describe(method.prepare(workspace.load("encoder"), 1)).to_words()
    with pytest.raises(FedtuneError, match="S702: found a ticket that does not describe the model's parts"):
        told = SplitFacts.from_words({**told, **spoiled} if spoiled else {})
        method.capabilities.split.load_site(workspace.settings("encoder"), "classify", LABELS, 1, told)


def test_a_body_that_answers_otherwise_is_refused_before_a_session(workspace: Any) -> None:
    """It claims the digest, and computes with one of its matrices changed."""
    method = method_of()
    tunable = method.prepare(workspace.load("encoder"), 1)
    facts = method.capabilities.split.describe(tunable)
    offer, card = facts.offer, facts.read_card()
    part = method.capabilities.split.load_body(workspace.settings("encoder"), "classify")
    with torch.no_grad():
        part.net.bert.encoder.layer[1].output.dense.weight.mul_(1.05)
    service = Service(
        Frozen(part),
        Offer("", offer.part, offer.first, offer.last, offer.width),
        lambda hello, peer: True,
        merging=None,
    )
    with pytest.raises(FedtuneError, match="S702: found a body whose answer to the self-test"):
        BodyAddress(lambda: Local(service), offer, "here", lambda number, client: "", card).open(
            1, 0, tunable.net.wishes()
        )


def test_nothing_of_the_body_stays_behind_in_a_sites_process(workspace: Any) -> None:
    """Every tensor that a load leaves alive is looked at."""
    method = method_of()
    whole = method.prepare(workspace.load("encoder"), 1)
    told, shapes = (
        method.capabilities.split.describe(whole),
        {tuple(v.shape) for v in whole.net.part.parameters("body").values()},
    )
    body = {
        tuple(v.flatten()[:8].tolist()) for v in whole.net.part.parameters("body").values() if v.std() > 0
    }
    gc.collect()
    known = {id(one) for one in gc.get_objects() if isinstance(one, torch.Tensor)}
    site = method.capabilities.split.load_site(workspace.settings("encoder"), "classify", LABELS, 1, told)
    gc.collect()
    new = [
        one
        for one in gc.get_objects()
        if isinstance(one, torch.Tensor)
        and id(one) not in known
        and not one.is_meta
        and tuple(one.shape) in shapes
    ]
    assert site and new and not body & {tuple(one.detach().flatten()[:8].tolist()) for one in new}

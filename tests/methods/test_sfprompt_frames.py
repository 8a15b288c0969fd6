"""A micro-batch that no frame can carry goes in smaller ones, to the same loss and gradients; one that a
frame can carry goes as it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fedtune.errors import FedtuneError
from fedtune.methods.sfprompt_work import Share
from fedtune.model.encode import encode
from fedtune.split.body import Frozen
from fedtune.split.channel import Local
from fedtune.split.frames import LIMITS, Limits
from fedtune.split.micro import Turn
from fedtune.split.service import Service, Terms
from fedtune.split.stream import Stream
from tests import tiny
from tests.methods.test_sfprompt_site import method_of

COUNT, WIDTH = 6, 32
CASES = [
    ("encoder", {}),
    ("encoder", {"slim": "off"}),
    ("encoder", {"cache_smashed": True}),
    ("encoder", {"codec": "int8"}),
    ("images", {}),
    ("decoder", {}),
    ("causal", {}),
]


def step(
    name: str, changes: dict[str, Any], workspace: Any, limits: Limits, cuts: bool = True
) -> tuple[float, list[torch.Tensor], int]:
    """Loss, gradients and how many micro-batches went up, of one micro-batch of six examples to a service
    with these limits; `cuts`: the client knows them."""
    method = method_of(**changes, train={"batch": COUNT, "steps": 1})
    tunable = method.prepare(workspace.load(name), 1)
    rows = tiny.images() if name == "images" else tiny.texts()
    data = encode(rows, tunable.base, max_length=16)
    service = Service(
        Frozen(tunable.net.part), tunable.net.own_body.offer, lambda hello, peer: True, Terms(limits=limits)
    )
    wishes = tunable.net.wishes()
    known = limits if cuts else LIMITS
    with Stream(lambda: Local(service), service.offer, Turn("run", 1, 0, ""), wishes, known) as session:
        share = Share(tunable, data, method.settings, session, 5, (0, 3))
        share.probed()
        before, all_of_it = next(session.numbers), list(range(COUNT))
        loss = share.through_body(all_of_it)([all_of_it], [data.collate(all_of_it)], COUNT)
        went = next(session.numbers) - before - 1
    grads = [torch.zeros(1) if v.grad is None else v.grad.clone() for v in tunable.parameters()]
    return loss, grads, went


@pytest.mark.parametrize(("name", "changes"), CASES, ids=str)
def test_what_no_frame_carries_goes_in_parts(name: str, changes: dict[str, Any], workspace: Any) -> None:
    whole = step(name, changes, workspace, LIMITS)
    tokens = 5 if name == "images" else 16
    few = Limits(payload=3 * (tokens + 3) * WIDTH * (1 if changes.get("codec") == "int8" else 4))
    parts = step(name, changes, workspace, few)
    assert whole[2] == 1 and parts[2] > 1
    assert parts[0] == pytest.approx(whole[0], rel=1e-5 if "codec" not in changes else 0.02)
    if "codec" not in changes:
        for one, other in zip(whole[1], parts[1], strict=True):
            torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-6)
    with pytest.raises(FedtuneError, match="W606"):
        step(name, changes, workspace, few, cuts=False)


def test_tokens_are_counted_with_prompts(workspace: Any) -> None:
    tokens = 3 * (max(len(t["text"].split()) for t in tiny.texts()) + 2 + 3)  # of three texts
    assert [step("encoder", {}, workspace, Limits(tokens=n))[2] for n in (2 * tokens, 2 * tokens - 1)] == [
        1,
        2,
    ]

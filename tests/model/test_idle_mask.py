"""A batch in which nothing is padded goes through a model without a mask, to the same bits: with one, a GPU
waits in each forward pass until the mask has been looked at."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fedtune.hf.probe import needs_mask
from fedtune.model.encode import Encoded, encode
from fedtune.model.fit import fit
from fedtune.model.forward import batch_of
from fedtune.model.loss import inputs_of, run, summed_loss, tokens_in
from fedtune.model.packing import owners_of
from fedtune.model.settings import TrainSettings
from fedtune.model.tunable import TunableModel, attach
from tests import tiny
from tests.tables import adapter_of

TASKS = ["causal", "decoder", "encoder"]


class Looks(TorchDispatchMode):
    """How often Python asks for a number, which waits for a GPU."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function._schema.name in ("aten::_local_scalar_dense", "aten::equal")
        return function(*args, **(kwargs or {}))


def tuned(workspace: Any, name: str, **how: Any) -> tuple[TunableModel, Encoded]:
    base = workspace.base(name)
    return attach(base, adapter_of(**(how or {"rank": 2})), 1), encode(tiny.texts(), base, max_length=32)


def alike(encoded: Encoded) -> list[int]:
    """Examples of one length."""
    lengths = [encoded.length(number) for number in range(len(encoded))]
    return max(([n for n, length in enumerate(lengths) if length == one] for one in set(lengths)), key=len)


@pytest.mark.parametrize("name", TASKS)
def test_what_is_whole_has_no_mask_and_the_same_loss(name: str, workspace: Any) -> None:
    tunable, encoded = tuned(workspace, name)
    whole, mixed = encoded.collate(alike(encoded)), encoded.collate(list(range(len(encoded))))
    assert "attention_mask" not in inputs_of(tunable, whole)[0] and "attention_mask" in whole
    assert "attention_mask" in inputs_of(tunable, mixed)[0]
    assert "attention_mask" not in batch_of(tunable, encoded, alike(encoded))
    assert not tunable.base.needs_mask
    without = summed_loss(tunable, whole)[0]
    tunable.base.needs_mask = True
    try:
        assert "attention_mask" in inputs_of(tunable, whole)[0]
        assert torch.equal(without, summed_loss(tunable, whole)[0])
    finally:
        tunable.base.needs_mask = False


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_virtual_tokens_keep_their_mask(kind: str, workspace: Any) -> None:
    tunable, encoded = tuned(workspace, "causal", kind=kind)
    assert "attention_mask" in inputs_of(tunable, encoded.collate(alike(encoded)))[0]


@pytest.mark.parametrize("name", TASKS)
def test_without_a_mask_a_pass_asks_for_no_number(name: str, workspace: Any) -> None:
    tunable, encoded = tuned(workspace, name)
    whole = encoded.collate(alike(encoded))
    arguments, _ = inputs_of(tunable, whole)
    looks = []
    for mask in ({}, {"attention_mask": whole["attention_mask"]}):
        with Looks() as seen:
            run(tunable.net, arguments | mask)
        looks.append(seen.count)
    assert looks == [0, 1]


def test_training_ends_with_the_same_bits(workspace: Any) -> None:
    ends = []
    for needed in (False, True):
        tunable, encoded = tuned(workspace, "encoder")
        tunable.base.needs_mask = needed
        fit(tunable, encoded, TrainSettings(lr=0.01, steps=3, batch=2), 7)
        ends.append({name: value.tobytes() for name, value in tunable.read().items()})
    tunable.base.needs_mask = False
    assert ends[0] == ends[1]


def test_a_model_that_says_something_else_without_a_mask_gets_one(workspace: Any) -> None:
    base = workspace.load("encoder")

    class Wanting(type(base.net)):  # type: ignore[misc]
        answer = 0.0

        def forward(self, attention_mask: Any = None, **more: Any) -> Any:
            said = super().forward(attention_mask=attention_mask, **more)
            if attention_mask is None:
                said.logits = said.logits + self.answer
            return said

    plain = type(base.net)
    base.net.__class__ = Wanting
    assert not needs_mask(base.net, base.tokenizer, base.context)
    Wanting.answer = 1e-3
    assert needs_mask(base.net, base.tokenizer, base.context)
    base.net.__class__ = plain


@pytest.mark.parametrize("name", TASKS)
def test_who_counts_tokens_reads_a_batch_without_a_mask_as_unpadded(name: str, workspace: Any) -> None:
    tunable, encoded = tuned(workspace, name)
    some = alike(encoded)
    whole, bare = encoded.collate(some), batch_of(tunable, encoded, some)
    assert "attention_mask" in whole and "attention_mask" not in bare
    assert tokens_in(bare) == tokens_in(whole) > 0
    assert (owners_of(bare) == owners_of(whole)).all()

"""Training behind kept states is training with the front in eval mode: the same numbers as the ordinary loop on a
network without dropout, and of dropout in front nothing is left."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedtune import config
from fedtune.errors import FedtuneError
from fedtune.model.base import Base, load
from fedtune.model.blocks import block_list
from fedtune.model.encode import Encoded, encode, joined
from fedtune.model.features import class_sums
from fedtune.model.fit import fit
from fedtune.model.kept_front import reserve, rows_of, try_front
from fedtune.model.settings import ModelSettings, TrainSettings
from fedtune.model.shared_rows import SharedRows
from fedtune.model.tunable import TunableModel, attach
from tests import small, tiny
from tests.tables import adapter_of

TRAIN = TrainSettings(lr=0.05, steps=3, batch=4, clip=1.0)
# every row in every step, and no noise: nothing is drawn
ROWS_CUT = {"max_grad_norm": 0.3, "noise_multiplier": 0.0, "sample_rate": 1.0}
PRIVATE = TrainSettings.model_validate({"lr": 0.05, "steps": 3, "batch": 4, "private": ROWS_CUT})


def rows_for(base: Base, count: int = 11) -> Encoded:
    rows = [
        {"text": " ".join(tiny.SENTENCES[i % 6].split()[: 2 + i % 5]), "label": "ab"[i % 2]}
        for i in range(count)
    ]
    return encode(rows, base, max_length=16)


def behind(base: Base, keep: bool = True, **more: Any) -> TunableModel:
    return attach(base, adapter_of(rank=2, last=1, keep_front=keep, **more), 1)


def trained(base: Base, keep: bool, data: Encoded, train: TrainSettings = TRAIN) -> dict[str, np.ndarray]:
    tunable = behind(base, keep)
    fit(tunable, data, train, 5)
    return tunable.read()


@pytest.mark.parametrize("model", ["encoder", "decoder", "causal"])
def test_steps_and_class_sums_are_those_of_the_whole_network(workspace: Any, model: str) -> None:
    base = workspace.base(model)
    data = workspace.encoded("causal") if model == "causal" else rows_for(base)
    kept, whole = trained(base, True, data), trained(base, False, data)
    start = behind(base, False).read()
    assert any(not np.allclose(whole[name], start[name], atol=1e-3) for name in whole)
    for name in whole:
        assert np.allclose(kept[name], whole[name], atol=2e-4), name
    if model != "causal":
        sums, known = (class_sums(behind(base, keep), data, moments=True) for keep in (True, False))
        for name in known:
            assert np.allclose(sums[name], known[name], atol=1e-6), name


@pytest.mark.parametrize("model", ["encoder", "causal"])
@pytest.mark.parametrize("by_opacus", [True, False])
def test_private_steps_begin_behind_the_front_too(
    model: str, by_opacus: bool, workspace: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not by_opacus:
        monkeypatch.setitem(sys.modules, "opacus.grad_sample", None)
    base = workspace.base(model)
    data = workspace.encoded("causal") if model == "causal" else rows_for(base)
    kept, whole = (trained(base, keep, data, PRIVATE) for keep in (True, False))
    start = behind(base, False).read()
    assert any(not np.allclose(whole[name], start[name], atol=1e-3) for name in whole)
    for name in whole:
        assert np.allclose(kept[name], whole[name], atol=2e-4), name


@pytest.mark.parametrize("train", [TRAIN, PRIVATE], ids=["plain", "private"])
def test_a_head_alone_is_trained_behind_all_blocks(train: TrainSettings, workspace: Any) -> None:
    base, found = workspace.base("encoder"), []
    data = rows_for(base)
    for keep in (True, False):
        tunable = attach(base, adapter_of("head", keep_front=keep), 1)
        try_front(tunable)
        fit(tunable, data, train, 5)
        found.append(tunable.read())
    for name in found[0]:
        assert np.allclose(found[0][name], found[1][name], atol=2e-4), name


@pytest.mark.parametrize("train", [TRAIN, PRIVATE], ids=["plain", "private"])
def test_blocks_in_front_run_once_and_without_dropout(train: TrainSettings, tmp_path: Path) -> None:
    base = load(ModelSettings(name=str(tiny.bert(tmp_path, dropout=0.5))), "classify", ("a", "b"), 1)
    data, runs = rows_for(base), []
    tunable = behind(base)
    front, last = block_list(base.net)
    for block in (front, last):
        inner = next(block.children())  # which runs only where the block does
        inner.register_forward_hook(
            lambda module, args, said, block=block: runs.append((block is front, module.training))
        )
    known = [row.clone() for row in rows_of(tunable, data)]
    fit(tunable, data, train, 5)
    class_sums(tunable, data)
    fit(tunable, data, train, 6)
    assert [one for one in runs if one[0]] == [(True, False)]
    assert runs.count((False, True)) >= 2 * train.steps  # the last block still drops, in every step
    with torch.no_grad():
        for number, row in enumerate(known):
            batch = data.collate([number])
            states = base.net.base_model(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                output_hidden_states=True,
            ).hidden_states
            assert torch.allclose(row, states[1][0], atol=1e-5)


def test_rows_in_one_place_are_those_that_the_clients_have(workspace: Any) -> None:
    base = workspace.base("encoder")
    tunable, parts = behind(base), [rows_for(base, 5), rows_for(base, 7)]
    known = [row for part in parts for row in rows_of(tunable, part)]
    assert [row.data_ptr() for row in rows_of(tunable, joined(parts, base))] == [
        row.data_ptr() for row in known
    ]


def test_what_a_fork_has_computed_is_there_for_all(workspace: Any) -> None:
    base = workspace.base("encoder")
    tunable, data = behind(base), rows_for(base)
    reserve(tunable, data)
    child = os.fork()
    if not child:
        try:
            rows_of(tunable, data)
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    written = [row.clone() for row in data.front.rows]
    assert all(float(row.abs().sum()) > 0 for row in written)
    assert all(map(torch.equal, rows_of(tunable, rows_for(base)), written))


def test_another_front_is_computed_anew(workspace: Any) -> None:
    base = workspace.base("encoder")
    tunable, data = behind(base), rows_for(base)
    first = [row.clone() for row in rows_of(tunable, data)]
    value = next(block_list(base.net)[0].parameters())
    before = value.detach().clone()
    with torch.no_grad():
        value.mul_(1.5)
    try:
        assert not torch.allclose(rows_of(tunable, data)[0], first[0])
    finally:
        with torch.no_grad():
            value.copy_(before)


def test_no_rows_need_no_memory() -> None:
    empty = SharedRows()
    assert not empty.known(1)
    empty.reserve([], 8)
    empty.done(7)
    assert empty.known(7) and empty.rows == []


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"method__adapter__last": 0}, "an adapter in the first block"),
        ({"method__train__together": 2}, "method.train.together"),
        ({"method__train__checkpointing": True}, "method.train.checkpointing"),
        ({"method__adapter__modules_to_save": ["pooler"]}, "modules_to_save"),
    ],
)
def test_what_reads_rows_otherwise_is_refused(tiny_bert: Path, data: Path, more: Any, named: str) -> None:
    change = {"method__adapter": {"kind": "lora", "rank": 2, "last": 1, "keep_front": True}}
    config.parse(small.tree(tiny_bert, data, **change))
    with pytest.raises(FedtuneError, match=rf"keep_front with .*{named}") as caught:
        config.parse(small.tree(tiny_bert, data, **change, **more))
    assert caught.value.code == "C104"


def test_an_adapter_before_all_blocks_leaves_nothing_in_front(workspace: Any) -> None:
    base = workspace.base("encoder")
    with pytest.raises(FedtuneError, match=r"M306: found method\.adapter\.keep_front"):
        try_front(attach(base, adapter_of(rank=2, last=2, keep_front=True), 1))  # of two
    try_front(behind(base))


@pytest.mark.parametrize(
    "method", [{"type": "fedpeft"}, {"type": "fedkseed", "space": "adapter"}, {"type": "experts"}], ids=str
)
def test_every_method_tries_its_front_before_a_run(
    method: dict[str, str], tiny_bert: Path, data: Path
) -> None:
    adapter = {"kind": "lora", "rank": 2, "last": 2, "keep_front": True}  # of two blocks
    recipe = config.parse(small.tree(tiny_bert, data, method={**method, "adapter": adapter}))
    with pytest.raises(FedtuneError, match=r"M306: found method\.adapter\.keep_front"):
        small.workspace_of(recipe)

"""A gate from sums: who is told what, that a text is read before any expert speaks, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fedtune
from fedtune.errors import FedtuneError
from fedtune.experts.state import experts_of, gate_of, general_of
from fedtune.model.prefix_sums import leveled
from fedtune.runtime.check import check, rows
from fedtune.runtime.checkpoints import load_state
from fedtune.runtime.expert_routing import routed
from fedtune.runtime.folder import RunFolder
from fedtune.schema import digest
from tests import small
from tests.methods.gated import IDS, same_wherever

BY = {
    "by": "given",
    "groups": ["a", "b", "", "a", "b", ""],
    "warm_up": 1,
    "min_clients": 2,
    "gate": {"fit": "sums", "width": 64},
}
SIX = {"rounds": 2, "partition": {"by": "iid", "clients": 6}}
CAUSAL = {**SIX, "data__task": "causal-lm", "data__max_length": 24, "data__client_test_share": 0.2}


def recipe(model: Path, data: Path, by: dict[str, Any], **changes: Any) -> Any:
    return small.recipe(model, data, method__type="experts", method__experts=by, **changes)


@pytest.fixture(scope="module")
def made(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    root = tmp_path_factory.mktemp("sums")
    return small.play(recipe(tiny_llama, small.write_rows(root), BY, **CAUSAL), root)[0]


def test_the_gate_changes_nothing_else_and_knows_who_has_no_expert(
    made: RunFolder, tiny_llama: Path, tmp_path: Path
) -> None:
    data = small.write_rows(tmp_path)
    plain = small.play(recipe(tiny_llama, data, BY | {"gate": {}}, **CAUSAL), tmp_path / "plain")[0]
    before, after = (load_state(folder, 2, "")[0] for folder in (plain, made))
    assert digest(general_of(after.shared)) == digest(general_of(before.shared))
    for name, tensors in experts_of(before.shared).items():
        assert digest(experts_of(after.shared)[name]) == digest(tensors)
    gate = gate_of(after.shared)
    assert gate and all(len(value) == 3 and np.isfinite(value).all() for value in gate.values())
    assert routed(made, None)["health"]["shares"].keys() == {"a", "b", "nobody"}


def test_scores_are_what_the_general_expert_alone_reads(made: RunFolder, tmp_path: Path) -> None:
    workspace = same_wherever(made, tmp_path / "out")
    tunable, router = workspace.tunable, workspace.tunable.routed
    seen: dict[str, torch.Tensor] = {}
    router.detach()
    hooks = [
        module.register_forward_pre_hook(lambda _, args, name=name: seen.__setitem__(name, args[0]))
        for name, module in tunable.base.net.named_modules()
        if name in router.gates
    ]
    with torch.no_grad():
        tunable.net(input_ids=IDS)
        for hook in hooks:
            hook.remove()
        total = sum(gate(leveled(seen[name])) for name, gate in router.gates.items())
        want = total.cumsum(1) / torch.arange(1, IDS.shape[1] + 1)[:, None]
        router.attach(tunable.base.net)
        tunable.net(input_ids=IDS)
    torch.testing.assert_close(router.reading.scores, want, rtol=1e-4, atol=1e-4)
    told = fedtune.evaluate(made.path, round="last", steer="self")
    assert told["loss"] > 0


@pytest.mark.parametrize(
    ("gate", "changes", "match"),
    [
        ({"rounds": 1}, {}, "gate.rounds with method.experts.gate.fit = 'sums'"),
        ({"owner": 1.0}, {}, "gate.owner"),
        ({"fit": "steps", "rounds": 1}, {}, "gate.width with method.experts.gate.fit = 'steps'"),
        ({}, {"aggregate": {"rule": "ffa"}}, "both factors"),
        ({}, {"method__experts": BY | {"shape": "inverted"}}, "experts in all blocks"),
        ({}, {"method__experts": {"by": "clients", "gate": {"fit": "sums"}}}, "by = 'clients'"),
    ],
)
def test_what_does_not_go_with_sums_is_refused(
    gate: Any, changes: Any, match: str, tiny_bert: Path, data: Path
) -> None:
    by = changes.pop("method__experts", BY | {"gate": BY["gate"] | gate})
    with pytest.raises(FedtuneError, match=f"C104.*{match}"):
        recipe(tiny_bert, data, by, **SIX, **changes)


def test_check_says_what_the_sums_show_and_take(tiny_bert: Path, data: Path) -> None:
    said = "\n".join(rows(check(recipe(tiny_bert, data, BY, **SIX))))
    assert "verb 'gate sums': sees each client's answer as it passes, uses each group's sum only" in said
    assert "over the rows of 2 clients or more" in said and "of other groups nothing" in said
    assert f"{4 * 64 * 67 // 2:,} bytes up" in said

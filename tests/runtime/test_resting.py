"""A coordinator whose clients are elsewhere, and who has nothing to score, keeps the base in its files."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from fedtune.config import Recipe
from fedtune.data import Federation, load
from fedtune.model import base as bases
from fedtune.runtime import run as runs
from fedtune.runtime.folder import create
from fedtune.runtime.local import local_transport
from fedtune.runtime.protocol import Link, Transport
from fedtune.runtime.resting import resting_base, rests
from fedtune.runtime.workspace import Workspace
from tests import small, tiny


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model in bfloat16, as most are stored."""
    folder = tiny.llama(tmp_path_factory.mktemp("halves") / "model")
    net = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    net.save_pretrained(folder)
    return folder


def language(model: Path, data: Path, **more: Any) -> Recipe:
    return small.recipe(model, data, data__task="causal-lm", data__max_length=16, **more)


def known(recipe: Recipe, rows: int = 0) -> Federation:
    found = load(recipe.data, recipe.partition, recipe.seed)
    return replace(found, test=found.test[:rows])


def test_a_coordinator_rests_unless_it_has_rows_or_watches(halves: Path, data: Path) -> None:
    plain = language(halves, data)
    assert rests(plain, known(plain)) and not rests(plain, known(plain, 1))
    watched = language(halves, data, watch__every=1)
    assert not rests(watched, known(watched))
    cut = language(halves, data, method={"type": "sfprompt", "head": 1, "tail": 0})
    assert not rests(cut, known(cut))  # it tells sites what their parts should say


def test_it_is_the_same_base_in_the_type_of_its_files(
    halves: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = language(halves, data)
    usual = bases.load(recipe.model, "causal-lm", (), recipe.seed)
    assert next(iter(usual.weights.values())).dtype == torch.float32  # `auto` on a CPU
    pick = bases.pick_device
    monkeypatch.setattr(
        bases, "pick_device", lambda name: torch.device("cuda") if name != "cpu" else pick("cpu")
    )
    resting = resting_base(recipe, known(recipe))
    held = {(value.device.type, value.dtype) for value in resting.weights.values()}
    assert held == {("cpu", torch.bfloat16)} and resting.fingerprint == usual.fingerprint


@pytest.mark.parametrize(
    "changes",
    [{"method": {"type": "fedkseed", "steps": 2}}, {"model__dtype": "float32"}],
    ids=["seeds", "said"],
)
def test_a_type_that_matters_is_kept(changes: dict[str, Any], halves: Path, data: Path) -> None:
    recipe = language(halves, data, **changes)
    resting = resting_base(recipe, known(recipe))
    assert {value.dtype for value in resting.weights.values()} == {torch.float32}


def test_a_run_has_the_bytes_of_one_whose_coordinator_holds_the_weights(
    halves: Path, data: Path, tmp_path: Path
) -> None:
    recipe = language(halves, data, rounds=2)
    folder, held = create(tmp_path, "", "sites"), []
    folder.begin(recipe)

    def carry(link: Link, workspace: Workspace) -> Transport:
        held.append(next(iter(workspace.base.weights.values())).dtype)
        other, _ = small.workspace_of(recipe)  # whose base is in float32, as clients' is
        return local_transport(link, other.client, other.done)

    found = runs.run(recipe, folder, lambda event: None, carry, known(recipe))
    _, whole, _ = small.play(recipe, tmp_path)
    assert held == [torch.bfloat16] and found["state_sha256"] == whole["state_sha256"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_weights_stay_in_their_files(data: Path, tmp_path: Path) -> None:
    """20 MB of weights in bfloat16 take less than a quarter of that from the process's own memory; in float32
    they take twice as much."""
    folder = tiny.llama(tmp_path / "model")
    config = transformers.LlamaConfig(
        vocab_size=300, hidden_size=256, intermediate_size=1024, num_hidden_layers=10, num_attention_heads=4,
        tie_word_embeddings=True, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    recipe = language(folder, data)
    resting_base(recipe, known(recipe))  # libraries take what they need
    before = own_memory()
    base = resting_base(recipe, known(recipe))
    resting, size = own_memory() - before, base.bytes_held
    usual = bases.load(recipe.model, "causal-lm", (), recipe.seed)
    assert size > 20e6 and resting < size / 4
    assert own_memory() - before - resting > 1.5 * size
    assert usual.bytes_held == 2 * size


def own_memory() -> int:
    """Bytes that no file backs."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("Anonymous:"))

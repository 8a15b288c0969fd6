"""Distilled emulators: the error is what stock transformers' hidden states say, the middle alone learns, and it
is made once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from fedtune.errors import FedtuneError
from fedtune.events import ClientDone, Event
from fedtune.model.distil import error_of, read
from fedtune.runtime.check import check, rows
from fedtune.runtime.emulator import write_emulator
from fedtune.runtime.run import run
from fedtune.runtime.workspace import EMULATOR
from tests import small
from tests.e2e.test_flower_grid import FakeGrid, journal, server_app
from tests.methods.test_offsite import BLOCKS, CAUSAL, KEPT, TABLE, deep, pruned

MIDDLE = ("model.layers.1.", "model.layers.2.")  # by the emulator's own numbers


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return deep("Llama", tmp_path_factory.mktemp("llama"))


def recipe(model: Path, data: Path, public: Path, **changes: Any) -> Any:
    how = {"data": str(public), "steps": 6, "batch": 4, "lr": 3e-3, **changes.pop("distil", {})}
    return small.recipe(model, data, method=TABLE | {"distil": how}, **{**CAUSAL, "rounds": 2, **changes})


@pytest.fixture(scope="module")
def public(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.write_rows(tmp_path_factory.mktemp("public"), 30)


@pytest.fixture(scope="module")
def played(llama: Path, data: Path, public: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder, result, _ = small.play(recipe(llama, data, public), tmp_path_factory.mktemp("run"))
    return folder, result


def test_the_error_is_of_hidden_states_as_stock_transformers_has_them(
    played: Any, llama: Path, data: Path, public: Path
) -> None:
    """Blocks 1 to 5 of the model are what two of the emulator stand for."""
    _, result = played
    workspace, _ = small.workspace_of(recipe(llama, data, public, distil={"steps": 1}))
    assert workspace.base.public is not None
    encoded = workspace.base.public.rows()
    whole = transformers.AutoModelForCausalLM.from_pretrained(llama).eval().double()
    few = pruned(llama, KEPT).double()
    off = size = 0.0
    for number in range(min(64, len(encoded))):
        ids = encoded.collate([number])["input_ids"]
        with torch.no_grad():
            theirs, mine = (
                net(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states[place]
                for net, place in ((whole, BLOCKS - 2), (few, len(KEPT) - 2))
            )
        off, size = off + float((theirs - mine).square().sum()), size + float(theirs.square().sum())
    assert result["distilled"]["before"] == pytest.approx(off / size, rel=1e-4)
    assert result["distilled"]["after"] < 0.9 * result["distilled"]["before"]


def test_a_batchs_error_is_relative_and_its_gradient_a_numerical_one() -> None:
    draw = torch.Generator().manual_seed(1)
    theirs, mine = (torch.randn(5, 3, generator=draw, dtype=torch.float64) for _ in range(2))
    mine.requires_grad_()
    wanted = np.mean((theirs - mine).detach().numpy() ** 2) / np.mean(theirs.numpy() ** 2)
    assert error_of(theirs, mine).item() == pytest.approx(float(wanted), rel=1e-12)
    assert error_of(10 * theirs, 10 * mine).item() == pytest.approx(float(wanted), rel=1e-12)
    assert torch.autograd.gradcheck(lambda x: error_of(theirs, x), (mine,))


@pytest.mark.parametrize("more", [{}, {"bits": 4}], ids=["exact", "rounded"])
def test_the_middle_alone_is_another_and_the_model_stays(
    more: dict[str, Any], llama: Path, data: Path, public: Path
) -> None:
    made = recipe(llama, data, public)
    made = made.model_copy(update={"method": made.method.model_copy(update=more)})
    workspace, _ = small.workspace_of(made)
    few, whole = pruned(llama, KEPT), transformers.AutoModelForCausalLM.from_pretrained(llama)
    mine = workspace.tunable.at_clients.base.weights
    for name, value in few.named_parameters():
        assert torch.equal(mine[name], value) != name.startswith(MIDDLE), name
        if more and name.startswith(MIDDLE) and value.ndim == 2:
            assert len(mine[name][0].unique()) <= 15
    for name, value in whole.named_parameters():
        assert torch.equal(workspace.base.weights[name], value), name


def test_it_is_made_once_and_sites_need_no_public_row(
    played: Any, llama: Path, data: Path, tmp_path: Path
) -> None:
    """A run that is stopped goes on without the rows, and ends with the bytes of one that was not."""
    folder, result = played
    public = small.write_rows(tmp_path, 30)
    made = recipe(llama, data, public)
    *_, fingerprint, told = write_emulator(made, tmp_path / "emulator")

    def stop(event: Event) -> None:
        if isinstance(event, ClientDone) and event.round == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        small.play(made, tmp_path, tell=stop)
    public.unlink()
    cut = small.RunFolder(tmp_path / "run")
    again = run(made, cut, lambda event: None)
    assert again["state_sha256"] == result["state_sha256"] and again["distilled"] == result["distilled"]
    assert (cut.path / EMULATOR).read_bytes() == (folder.path / EMULATOR).read_bytes()
    site, _ = small.workspace_of(recipe(tmp_path / "emulator", data, public))
    assert site.tunable.emulator is None and fingerprint.endswith(site.base.fingerprint)
    assert told == "distilled error {before:.4g} before, {after:.4g} after".format(**result["distilled"])
    plain = small.recipe(tmp_path / "emulator", data, method=TABLE, **CAUSAL)
    with pytest.raises(FedtuneError, match=r"S721: .* with bits = 0, distilled at this site"):
        small.workspace_of(plain)


def test_a_damaged_file_is_noticed(played: Any, tmp_path: Path) -> None:
    held = bytearray((played[0].path / EMULATOR).read_bytes())
    held[-1] ^= 1
    (tmp_path / EMULATOR).write_bytes(held)
    with pytest.raises(FedtuneError, match=r"R403: .*which is no distilled emulator \(other numbers"):
        read(tmp_path / EMULATOR)


@pytest.mark.slow
def test_a_run_on_flowers_grid_distils_the_same(played: Any, llama: Path, data: Path, public: Path) -> None:
    folder, _ = played
    other = small.create(folder.path.parent, "", "grid")
    server_app.serve(FakeGrid({7: 3, 5: 1, 6: 2, 9: 0}), recipe(llama, data, public), other, lambda e: None)
    assert journal(other) == journal(folder)


@pytest.mark.parametrize(
    ("distil", "more", "said"),
    [
        ({"data": "", "steps": 3}, {}, r"C104: found \[method\.distil\] without data"),
        ({"lm": 1.0}, {"data__task": "classify"}, r"C104: found method\.distil\.lm = 1"),
        ({"data": "nowhere.jsonl"}, {}, "D201"),
    ],
)
def test_what_cannot_be_distilled_is_refused(
    distil: dict[str, Any], more: dict[str, Any], said: str, llama: Path, data: Path, public: Path
) -> None:
    with pytest.raises(FedtuneError, match=said):
        small.workspace_of(recipe(llama, data, public, distil=distil, **more))


def test_rows_of_which_nothing_is_left_are_refused_and_check_says_what_is_distilled(
    llama: Path, data: Path, tmp_path: Path
) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text('{"text": ""}\n')
    made = recipe(llama, data, empty)
    with pytest.raises(FedtuneError, match="D202"):
        small.workspace_of(made)
    lines = rows(check(made))
    assert any(line.endswith(f"distilled first, 6 steps on '{empty}'") for line in lines)
    assert any("distilled to stand for all of them" in line for line in lines)


def test_the_emulators_own_loss_may_count_too(played: Any, llama: Path, data: Path, public: Path) -> None:
    workspace, _ = small.workspace_of(recipe(llama, data, public, distil={"lm": 1.0}))
    assert workspace.tunable.distilled["after"] > played[1]["distilled"]["after"]

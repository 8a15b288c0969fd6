"""Supports that are chosen again: positions as dense numpy finds them in the weight so far, what rests stays to
the bit, and stock peft loads all stages as one support."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import safetensors.numpy
import torch
import transformers

from fedtune.errors import ClientFailed, FedtuneError
from fedtune.events import ClientDone, Event, RoundDone
from fedtune.methods.lift_stages import PRINT, check_print, told_print
from fedtune.model.export import OWN_FILE, load_adapter, save_adapter, save_merged
from fedtune.model.fit import fit
from fedtune.model.lora_ranks import training_only
from fedtune.model.loss import summed_loss
from fedtune.model.settings import TrainSettings
from fedtune.model.sparse_stages import stage_of, support_print
from fedtune.model.sparse_support import INDICES, VALUES, sparse_layers
from fedtune.model.tunable import attach
from fedtune.runtime.check import check
from fedtune.runtime.checkpoints import load_state
from fedtune.runtime.folder import RunFolder
from fedtune.schema import digest
from tests import small
from tests.tables import adapter_of

TABLE: dict[str, Any] = {"kind": "lift", "rank": 4, "filter_rank": 3, "stages": 3, "refresh": 2}


def trained(workspace: Any, stages: int) -> Any:
    """A tunable model whose first stages were trained one after the other."""
    tunable = attach(workspace.base("encoder"), adapter_of(**TABLE), 1)
    for stage in range(stages):
        with training_only(tunable, tunable.settings.turn(tunable.named, 1 + 2 * stage)):
            fit(tunable, workspace.encoded("encoder"), TrainSettings(lr=1e-2, steps=2), 2 + stage)
    return tunable


def test_positions_are_those_of_the_weight_so_far(workspace: Any) -> None:
    tunable = trained(workspace, 2)
    values = tunable.read()
    moved = 0
    for name, layer in sparse_layers(tunable.net).items():
        weight = layer.get_base_layer().weight.detach().double().numpy()
        change = np.zeros(weight.size)
        for stage in (0, 1):
            so_far = weight + change.reshape(weight.shape)
            u, s, vt = np.linalg.svd(so_far, full_matrices=False)
            size = np.abs((u[:, :3] * s[:3]) @ vt[:3]).reshape(-1)
            found = layer.supports.of(stage).numpy()
            rest = np.ones(size.size, bool)
            rest[found] = False
            assert len(found) == 4 * sum(weight.shape) and (np.diff(found) > 0).all()
            assert size[found].min() >= size[rest].max() - 1e-9
            own = values[name + VALUES + (f".stage{stage}" if stage else "")]
            assert np.abs(own).max() > 1e-3
            change[found] += own
        moved += not torch.equal(layer.supports.of(0), layer.supports.of(1))
        np.testing.assert_allclose(
            layer.get_delta_weight("default").detach().numpy().reshape(-1), change, atol=1e-6
        )
        assert not values[f"{name}{VALUES}.stage2"].any() and 2 not in layer.supports.known
    assert moved > 6


def test_what_rests_stays_and_nothing_is_chosen_twice(workspace: Any) -> None:
    """Neither by steps, nor by the same state written again; by another one it is."""
    tunable = trained(workspace, 1)
    first, chosen = tunable.read(), list[str]()
    layers = sparse_layers(tunable.net)
    for layer in layers.values():
        choose = layer.supports.choose

        def counted(name: str, *rest: Any, choose: Any = choose) -> Any:
            chosen.append(name)
            return choose(name, *rest)

        layer.supports.choose = counted
    with training_only(tunable, tunable.settings.turn(tunable.named, 3)):
        fit(tunable, workspace.encoded("encoder"), TrainSettings(lr=1e-2, steps=3), 7)
    second = tunable.read()
    assert sorted(chosen) == sorted(set(chosen)) and len(chosen) == len(layers)
    for name in first:
        assert np.array_equal(first[name], second[name]) is (stage_of(name) in (0, 2)), name
    tunable.write(second)
    summed_loss(tunable, workspace.encoded("encoder").collate([0]))
    assert len(chosen) == len(layers)
    one = next(name for name in second if stage_of(name) == 0)
    tunable.write({**second, one: second[one] * 2})
    summed_loss(tunable, workspace.encoded("encoder").collate([0]))
    assert len(chosen) == len(layers) + 1


def test_stock_peft_loads_all_stages_as_one_support(workspace: Any, tmp_path: Path) -> None:
    tunable = trained(workspace, 2)
    batch = workspace.encoded("encoder").collate(range(3))
    with torch.no_grad():
        want = summed_loss(tunable, batch)[1]
    save_adapter(tunable, tmp_path / "adapter", str(workspace.folders["encoder"]), "# a card\n")
    held = safetensors.numpy.load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {name for name in held if not name.endswith(INDICES)} == {
        name for name in tunable.named if not stage_of(name)
    }
    auto = transformers.AutoModelForSequenceClassification
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = auto.from_pretrained(workspace.folders["encoder"], num_labels=2)
        stock = peft.PeftModel.from_pretrained(net, str(tmp_path / "adapter")).eval()
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    with torch.no_grad():
        assert torch.allclose(stock(**inputs).logits, want, atol=1e-5)
    save_merged(tunable, tmp_path / "merged", "# a card\n")
    with torch.no_grad():
        merged = auto.from_pretrained(tmp_path / "merged").eval()(**inputs).logits
    assert torch.allclose(merged, want, atol=2e-5)
    state = tunable.read()
    assert (tmp_path / "adapter" / OWN_FILE).exists()
    again = load_adapter(workspace.load("encoder", seed=77), tmp_path / "adapter")
    assert digest(again.read()) == digest(state)
    with torch.no_grad():
        assert torch.equal(summed_loss(again, batch)[1], want)


def test_a_run_adds_stage_to_stage(tiny_bert: Path, data: Path, tmp_path: Path) -> None:
    """Up travels the stage alone, and what it is not about stays as its last round left it."""
    changes = {"method__adapter": {**TABLE, "stages": 2, "refresh": 2}, "evaluate": {"local": True}}
    recipe = small.recipe(tiny_bert, data, rounds=5, **changes)
    states: dict[int, Any] = {}

    def keep(event: Event) -> None:  # before a later round has it removed
        if isinstance(event, RoundDone):
            states[event.round] = load_state(RunFolder(tmp_path / "run"), event.round, "")[0].shared

    _, result, events = small.play(recipe, tmp_path, keep)
    assert PRINT not in states[5]
    for name, value in states[5].items():
        moved = not np.array_equal(value, states[4][name])
        assert moved is (stage_of(name) != 0), name
    stages = {number: [v.any() for n, v in one.items() if stage_of(n) == 1] for number, one in states.items()}
    assert not any(stages[2]) and all(stages[3])
    done = [event for event in events if isinstance(event, ClientDone)]
    predicted = check(recipe)
    assert {event.down_bytes for event in done} == {predicted.down_bytes}
    one_stage = sum(value.size for name, value in states[5].items() if stage_of(name) != 1)
    assert all(abs(event.up_bytes - 4 * one_stage) < 2500 for event in done)
    assert result["left_out"] == 0


def test_a_client_that_finds_other_weights_is_left_out(workspace: Any) -> None:
    tunable = trained(workspace, 1)
    said = told_print(tunable, 3)
    check_print(tunable, said, 3)
    assert said[PRINT].any() and not told_print(tunable, 1)[PRINT].any()
    assert np.array_equal(support_print(tunable.net, 1), said[PRINT])
    with pytest.raises(ClientFailed, match="W604: found other weights to train in round 3"):
        check_print(tunable, {PRINT: said[PRINT] + 1}, 3)
    name = next(name for name in tunable.named if stage_of(name) == 0)
    tunable.write({**tunable.read(), name: tunable.read()[name] * -30})
    with pytest.raises(ClientFailed, match="W604"):
        check_print(tunable, said, 3)
    assert told_print(attach(workspace.base("encoder"), adapter_of(kind="lift", rank=2), 1), 3) == {}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"aggregate": {"rule": "median"}}, "rule = 'median', expected rule = 'mean'"),
        ({"method__server": {"optimizer": "sgd", "lr": 0.7}}, "no moments"),
        ({"downlink": {"step": "int8"}, "chain": [{"step": "quantize", "bits": 8}]}, "no .downlink"),
        ({"method__start_from": "elsewhere"}, "one after the other"),
        ({"rounds": 4}, "a last stage that begins"),
        ({"method__type": "experts", "method__experts": {"by": "clients"}}, "type = 'experts'"),
    ],
)
def test_what_cannot_have_stages_is_refused(
    changes: dict[str, Any], said: str, tiny_bert: Path, data: Path
) -> None:
    with pytest.raises(FedtuneError, match=f"C104: .*{said}"):
        small.recipe(tiny_bert, data, **{"rounds": 6, "method__adapter": TABLE, **changes})


def test_more_weights_than_there_are_in_all_stages_are_refused(workspace: Any) -> None:
    with pytest.raises(FedtuneError, match=r"M306: .*rank = 6 in 3 stages for .* expected at most 5"):
        attach(workspace.base("encoder"), adapter_of(**{**TABLE, "rank": 6}), 1)

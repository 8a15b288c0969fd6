"""FedKSeed: who does not fit is refused, a message has a few hundred bytes, projections, and a model as a
file of kilobytes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedtune.config import Recipe
from fedtune.errors import FedtuneError, Refused
from fedtune.events import ClientDone, ClientLeftOut, RoundDone
from fedtune.methods.fedkseed_settings import FedKSeedSettings
from fedtune.methods.fedkseed_walk import require_converging
from fedtune.model.initial_values import reset
from fedtune.rng import seed_of
from fedtune.runtime.check import check, rows
from fedtune.runtime.checkpoints import load_state
from fedtune.runtime.client_half import respond
from fedtune.runtime.local import local_transport
from fedtune.runtime.protocol import Ask, Link, Transport
from fedtune.runtime.workspace import Workspace
from fedtune.schema import Schema
from fedtune.types import Round, State, Tensors
from fedtune.wire import EVERYONE, encode_state
from tests import small, tiny
from tests.marks import mostly_thorough
from tests.methods.kseed import SGD, recipe_of
from tests.proxy import WithVerbs

# --- who does not fit is refused ---


def ask_of(recipe: Recipe, workspace: Workspace, link: Link, state: State) -> Ask:
    now = Round(1, recipe.seed, (0,))
    return Ask(
        0,
        "train",
        now,
        encode_state(state.shared, link.header("train", EVERYONE, now, Schema.of(state.shared))),
    )


def test_a_client_with_another_start_scale_or_base_is_refused_with_a_sentence(
    tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    recipe = recipe_of(tiny_bert, data)
    workspace, link = small.workspace_of(recipe)
    ask = ask_of(recipe, workspace, link, link.method.start(workspace.tunable))
    respond(link, workspace.client_with(0, {}), ask)
    for changes in ({"lr": 2e-3}, {"clip": 10.0}, {"pool": "independent"}):
        other, theirs = small.workspace_of(recipe_of(tiny_bert, data, changes))
        with pytest.raises(
            Refused, match=r"W604: found accumulators of other initial values, another pool or another scale"
        ):
            respond(theirs, other.client_with(0, {}), ask)
    other, theirs = small.workspace_of(
        recipe_of(tiny_bert, data, seed=4)
    )  # another seed: other pools, another head
    with pytest.raises(Refused, match="W604"):
        respond(theirs, other.client_with(0, {}), ask)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        tiny.bert(tmp_path / "other")
    import transformers

    net = transformers.BertModel.from_pretrained(tmp_path / "other")
    with torch.no_grad():
        next(net.parameters())[0, 0] += 1
    net.save_pretrained(tmp_path / "other")
    other, theirs = small.workspace_of(recipe_of(tmp_path / "other", data))
    with pytest.raises(Refused, match=r"W604.*base"):
        respond(theirs, other.client_with(0, {}), ask)


def test_a_scalar_that_no_honest_client_sends_is_refused_and_the_run_unharmed(
    tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    recipe = recipe_of(tiny_bert, data)

    def lying(link: Link, workspace: Workspace) -> Transport:
        honest_verb = link.method.verbs["train"]

        def answer(given: Schema, now: Round) -> Schema:
            stated = honest_verb.answer(given, now)
            return replace(stated, whole=tuple((name, kind, 32767) for name, kind, _ in stated.whole))

        def train(client: Any, given: Tensors, now: Round) -> Any:
            update = honest_verb.work(client, given, now)
            return (
                replace(update, tensors={"steps": update.tensors["steps"] * 0 + 32000 * int(update.weight)})
                if client.id == 2
                else update
            )

        liar_method: Any = WithVerbs(link.method, {"train": replace(honest_verb, work=train, answer=answer)})

        honest = local_transport(link, workspace.client, workspace.done)
        liar = local_transport(replace(link, method=liar_method), workspace.client, workspace.done)
        return lambda asks: [reply for ask in asks for reply in (liar if ask.client == 2 else honest)([ask])]

    _, result, events = small.play(recipe, tmp_path / "a", carry=lying)
    out = [e for e in events if isinstance(e, ClientLeftOut)]
    assert {(e.client, e.code) for e in out} == {(2, "W603")} and result[
        "left_out"
    ] == 3  # another bound is another schema

    def without(link: Link, workspace: Workspace) -> Transport:
        carry = local_transport(link, workspace.client, workspace.done)
        return lambda asks: [reply for reply in carry(asks) if reply.client != 2]

    assert result["state_sha256"] == small.play(recipe, tmp_path / "b", carry=without)[1]["state_sha256"]


@pytest.mark.parametrize(
    "changes", [{"lr": 5.0}, {"estimator": "gradient", "train": {"optimizer": "sgd", "lr": 50.0, "steps": 3}}]
)
def test_divergence_is_caught_and_named(
    changes: dict[str, Any], tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    recipe = recipe_of(tiny_bert, data, {"steps": 20, **changes})
    with pytest.raises(
        FedtuneError,
        match=r"R408: found a training loss of .* in round \d that began at 1\..*lower method.lr",
    ):
        small.play(recipe, tmp_path)


def test_a_loss_that_starts_low_may_rise_by_one_before_it_is_called_divergence() -> None:
    settings = FedKSeedSettings(guard=2.0)
    require_converging(1.4, 0.48, 2, settings)
    require_converging(3.9, 2.0, 2, settings)
    for loss, first in ((1.5, 0.48), (4.1, 2.0)):
        with pytest.raises(FedtuneError, match="R408"):
            require_converging(loss, first, 2, settings)
    require_converging(99.0, 0.48, 2, FedKSeedSettings(guard=0.0))


def test_a_loss_that_is_not_finite_leaves_the_client_out(tiny_bert: Path, data: Path, tmp_path: Path) -> None:
    recipe = recipe_of(tiny_bert, data)

    def poisoned(link: Link, workspace: Workspace) -> Transport:
        carry = local_transport(link, workspace.client, workspace.done)
        real = link.method.rebuild

        def rebuild(tunable: Any, given: Tensors) -> None:
            real(tunable, given)
            if poisoned_now:
                tunable.parameters()[0].data.fill_(float("nan"))

        link.method.rebuild = rebuild

        def one_by_one(asks: Any) -> Any:
            for ask in asks:
                poisoned_now.clear()
                poisoned_now.extend([1] if ask.client == 1 else [])
                yield from carry([ask])
            poisoned_now.clear()

        return one_by_one

    poisoned_now: list[int] = []
    _, result, events = small.play(recipe, tmp_path, carry=poisoned)
    out = [e for e in events if isinstance(e, ClientLeftOut)]
    assert (
        {(e.client, e.code) for e in out} == {(1, "W607")}
        and result["left_out"] == 3
        and "lower method.lr" in out[0].text
    )


# --- what it costs ---


@pytest.mark.thorough
def test_a_round_costs_under_18_kilobytes(tiny_bert: Path, data: Path, tmp_path: Path) -> None:
    """The paper's setting, K = 4096 and 200 steps: 17,992 bytes of numbers alone as it counts, at least;
    whole messages here."""
    recipe = recipe_of(tiny_bert, data, {"size": 4096, "steps": 200}, rounds=2, sampling={"count": 1})
    sent = [e for e in small.play(recipe, tmp_path)[2] if isinstance(e, ClientDone)]
    assert len(sent) == 2
    for e in sent:
        assert 400 < e.up_bytes < 700 and e.down_bytes < 1200  # the accumulators of 200 directions at most
    assert check(recipe).up_bytes + check(recipe).down_bytes < 17_992  # whatever the accumulators are
    bit = recipe_of(tiny_bert, data, {"size": 4096, "steps": 200, "bits": 1}, rounds=1, sampling={"count": 1})
    assert [e.up_bytes < 300 for e in small.play(bit, tmp_path / "bit")[2] if isinstance(e, ClientDone)] == [
        True
    ]


@pytest.mark.parametrize("changes", mostly_thorough([{}, {"refresh": 1}], [{}]))
def test_clients_that_hold_accumulators_get_what_changed_and_end_alike(
    changes: dict[str, Any], tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    """Two of four clients a round, six rounds: some come back after a while. The same model as when
    everything travels, in fewer bytes."""
    many = {"size": 1024, "steps": 16, **changes}
    _, held, events = small.play(
        recipe_of(tiny_bert, data, many, rounds=6, sampling={"count": 2}), tmp_path / "a"
    )
    _, whole_, others = small.play(
        recipe_of(tiny_bert, data, {**many, "hold": False}, rounds=6, sampling={"count": 2}), tmp_path / "b"
    )
    assert held["state_sha256"] == whole_["state_sha256"] and held["left_out"] == 0
    down = {(e.round, e.client): e.down_bytes for e in events if isinstance(e, ClientDone)}
    full = {(e.round, e.client): e.down_bytes for e in others if isinstance(e, ClientDone)}
    back = {key for key in down if any((number, key[1]) in down for number in range(1, key[0]))}
    assert len(back) >= 6 and all(down[key] == full[key] for key in down.keys() - back)
    assert all(down[key] <= full[key] for key in back) and min(down[key] / full[key] for key in back) < 0.6


def test_a_client_that_lost_its_accumulators_is_given_all_in_the_same_round(
    tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    recipe = recipe_of(tiny_bert, data)

    _, result, events = small.play(recipe, tmp_path / "a", carry=small.forgetful(1, 3))
    down = {e.client: e.down_bytes for e in events if isinstance(e, ClientDone) and e.round == 3}
    assert result["left_out"] == 0 and down[1] > down[0] == down[2] == down[3]
    assert result["state_sha256"] == small.play(recipe, tmp_path / "b")[1]["state_sha256"]


def test_check_says_what_travels_and_what_is_trained(tiny_bert: Path, data: Path) -> None:
    said = "\n".join(rows(check(recipe_of(tiny_bert, data))))
    assert (
        "fedkseed / full, hadamard pool of 256" in said
        and "(100.000 %)" in said
        and "uses it singly" in said
        and "spsa: activations" in said
    )
    pooled = check(recipe_of(tiny_bert, data, {"uplink": "pool", "only": ["*.layer.1.*"]}))
    said = "\n".join(rows(pooled))
    assert (
        "uses the sum only" in said
        and "fedkseed / part" in said
        and pooled.plan.trainable < pooled.plan.total / 2
    )


# --- projections ---


def test_with_as_many_directions_as_parameters_a_projection_is_the_update_itself(
    tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    """The head has 99 values and the pool 128 orthogonal directions: one round of gradient clients is one
    round of FedAvg."""
    train = {"optimizer": "sgd", "lr": 0.5, "steps": 3, "batch": 4}
    fine = {
        "space": "adapter",
        "adapter": {"kind": "head"},
        "size": 128,
        "lr": 1e-5,
        "estimator": "gradient",
        "train": train,
    }
    recipe = recipe_of(tiny_bert, data, fine, rounds=1)
    workspace, link = small.workspace_of(recipe)
    start = link.method.start(workspace.tunable)
    now = Round(1, recipe.seed, (0, 1, 2, 3))
    from fedtune.model.fit import fit
    from fedtune.runtime.cohort import RoundCohort

    got = link.method.round(
        start,
        RoundCohort(
            link,
            now,
            local_transport(link, workspace.client, workspace.done),
            lambda e: None,
            workspace.names,
        ),
        now,
    )
    link.method.install(got, workspace.tunable)
    tuned = workspace.tunable.read()
    want = {name: np.zeros(value.shape) for name, value in tuned.items()}
    total = sum(len(workspace.train(n)) for n in now.members)
    for n in now.members:
        reset(workspace.tunable)
        fit(
            workspace.tunable,
            workspace.train(n),
            recipe.method.train,
            seed_of("train", recipe.seed, 1, n),
            progress=(0, 1),
        )
        for name, value in workspace.tunable.read().items():
            want[name] += value * (len(workspace.train(n)) / total)
    reset(workspace.tunable)
    for name, value in tuned.items():
        assert float(np.abs(want[name] - workspace.tunable.read()[name]).max()) > 1e-3
        np.testing.assert_allclose(value, want[name], atol=1e-5)


def test_auto_takes_gradients_where_memory_allows(tiny_bert: Path, data: Path, tmp_path: Path) -> None:
    recipe = recipe_of(tiny_bert, data, {"estimator": "auto", "memory": [8.0, 1e-6], "train": SGD}, rounds=1)
    events = [e for e in small.play(recipe, tmp_path)[2] if isinstance(e, ClientDone)]
    assert [e.metrics["gradient"] for e in events] == [1.0, 0.0, 1.0, 0.0]


def test_a_masked_space_leaves_the_rest_alone(tiny_bert: Path, data: Path, tmp_path: Path) -> None:
    recipe = recipe_of(tiny_bert, data, {"only": ["*.layer.1.*"]})
    workspace, _ = small.workspace_of(recipe)
    assert all(
        ".layer.1." in name or name.startswith(("classifier", "bert.pooler"))
        for name in workspace.tunable.named
    )
    with pytest.raises(FedtuneError, match="M302"):
        small.workspace_of(recipe_of(tiny_bert, data, {"only": ["*.layer.7.*"]}))


# --- FedKSeed-Pro ---


@pytest.mark.thorough
def test_importance_follows_the_scalars_that_the_server_read(
    tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    recipe = recipe_of(tiny_bert, data, {"importance": True, "size": 32, "steps": 40})
    folder, _, events = small.play(recipe, tmp_path)
    state, _ = load_state(folder, 3, "")
    assert state.kept["visits"].sum() == 3 * 4 * 40
    levels = state.shared["importance"].view(np.uint8)
    average = state.kept["amplitudes"] / (state.kept["visits"] + 1)
    assert levels.argmax() == average.argmax() and levels.max() == 255 and levels.min() == 0
    assert [e.metrics["clipped"] for e in events if isinstance(e, RoundDone)] == [0.0] * 3


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"size": 100}, "a power of two"),
        ({"directions": "gaussian"}, "rademacher"),
        ({"importance": True, "uplink": "pool"}, "does not read scalars"),
        ({"importance": True, "refresh": 2}, "a pool that lasts"),
        ({"estimator": "gradient", "uplink": "steps"}, "uplink = 'pool'"),
        ({"adapter": {"kind": "lora"}}, "method.space = 'adapter'"),
        ({"bits": 1, "clip": 3.0}, "a sign has no size"),
        ({"memory": [1.0]}, "auto"),
        ({"estimator": "fzoo", "group": 4}, "set steps = 8"),
        ({"estimator": "fzoo", "group": 2, "bits": 1}, "fzoo needs sizes"),
        ({"group": 2}, "estimator = 'fzoo'"),
        ({"curvature": True}, "refresh = 1"),
        ({"curvature": True, "refresh": 1, "estimator": "gradient"}, "estimator = 'spsa'"),
    ],
)
def test_settings_that_cannot_go_together_are_refused(
    changes: dict[str, Any], sentence: str, tiny_bert: Path, data: Path
) -> None:
    with pytest.raises(FedtuneError, match="C104") as caught:
        recipe_of(tiny_bert, data, changes)
    assert sentence in str(caught.value)
    with pytest.raises(FedtuneError, match=r"C104.*none but .ring. and .mask."):
        recipe_of(tiny_bert, data, chain=[{"step": "quantize", "bits": 8}])

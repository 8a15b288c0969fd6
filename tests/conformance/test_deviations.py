"""Answers that are not as asked: what is wrong with them is named, and the others count."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedtune.errors import ClientFailed, FedtuneError, Refused
from fedtune.events import Chose, ClientDone, RoundDone
from fedtune.runtime.client_half import respond
from fedtune.runtime.local import local_transport
from fedtune.runtime.protocol import Ask, Link, Reply, Transport
from fedtune.runtime.run import run
from fedtune.runtime.workspace import Workspace
from fedtune.schema import Schema
from fedtune.types import Round, State, Update
from fedtune.wire import EVERYONE, encode_state
from tests import small
from tests.conformance.test_laws import sha
from tests.proxy import with_work


def test_a_client_that_answers_nan_is_left_out_and_named(tiny_bert: Path, data: Path, tmp_path: Path) -> None:
    recipe = small.recipe(tiny_bert, data)

    def poisoned(link: Link, workspace: Workspace) -> Transport:
        return with_client(
            link, workspace, 2, lambda u: replace(u, tensors={k: v * np.nan for k, v in u.tensors.items()})
        )

    _, result, events = small.play(recipe, tmp_path, carry=poisoned)
    out = [e for e in events if type(e).__name__ == "ClientLeftOut"]
    assert result["left_out"] == 3 and {(e.client, e.code) for e in out} == {(2, "W607")}  # type: ignore[attr-defined]
    assert "client" in str(out[0].text) and all(e.left_out == 1 for e in events if isinstance(e, RoundDone))  # type: ignore[attr-defined]

    honest = small.recipe(tiny_bert, data, sampling={"count": 3})  # the others' answers still count
    assert result["state_sha256"] != sha(honest, tmp_path / "h")


def test_an_answer_beyond_the_limits_is_left_out_and_the_others_count(
    tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    """Client 2 claims a hundred times its weight, client 3 sends a thousand times its move; both are named,
    the honest two remain."""
    recipe = small.recipe(
        tiny_bert,
        data,
        rounds=1,
        chain=[{"step": "quantize", "bits": 8}],
        limits={"norm": 10.0, "weight": 100.0},
    )

    def greedy(link: Link, workspace: Workspace) -> Transport:
        def heavy(update: Update) -> Update:
            return Update.of(
                {name: value / update.weight for name, value in update.tensors.items()},
                100 * update.weight,
                {"loss": 1.0},
            )

        def far(update: Update) -> Update:
            return replace(update, tensors={name: value * 1000 for name, value in update.tensors.items()})

        liars = with_work(
            link.method, lambda work: lambda c, g, n: {2: heavy, 3: far}.get(c.id, lambda u: u)(work(c, g, n))
        )
        return local_transport(replace(link, method=liars), workspace.client, workspace.done)

    _, result, events = small.play(recipe, tmp_path, carry=greedy)
    out = {e.client: e.code for e in events if type(e).__name__ == "ClientLeftOut"}  # type: ignore[attr-defined]
    assert result["left_out"] == 2 and out == {2: "W606", 3: "W606"}
    assert {e.client for e in events if isinstance(e, ClientDone)} == {0, 1}


def with_client(link: Link, workspace: Workspace, bad: int, spoil: Any) -> Transport:
    """The local transport, with one client's answers spoiled before they are sent."""
    spoiled = with_work(
        link.method, lambda work: lambda c, g, n: spoil(work(c, g, n)) if c.id == bad else work(c, g, n)
    )
    return local_transport(replace(link, method=spoiled), workspace.client, workspace.done)


@pytest.mark.thorough
def test_a_round_without_any_answer_ends_the_run_and_can_be_resumed(
    tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    recipe = small.recipe(tiny_bert, data)

    def nobody(link: Link, workspace: Workspace) -> Transport:
        real = local_transport(link, workspace.client, workspace.done)
        failure = ClientFailed("F503", "no answer", "one", "wait")
        return lambda asks: (
            real(asks) if asks[0].now.number < 2 else [Reply(ask.client, failure=failure) for ask in asks]
        )

    with pytest.raises(FedtuneError, match=r"R405.*round 2.*F503"):
        small.play(recipe, tmp_path, carry=nobody)
    result = run(recipe, small.RunFolder(tmp_path / "run"), lambda event: None)
    assert result["state_sha256"] == sha(recipe, tmp_path / "whole")


def test_respond_refuses_a_state_of_other_shapes(tiny_bert: Path, data: Path) -> None:
    workspace, link = small.workspace_of(small.recipe(tiny_bert, data))
    wrong = {"x": np.zeros(3, np.float32)}
    now = Round(1, 3, (0,))
    payload = encode_state(wrong, link.header("train", EVERYONE, now, Schema.of(wrong)))
    with pytest.raises(Refused, match="W603"):
        respond(link, workspace.client_with(0, {}), Ask(0, "train", now, payload))


def test_a_hundred_clients_cost_one_model(tiny_bert: Path, data: Path, tmp_path: Path) -> None:
    """Every client works on the same parameter objects; nothing but its state is its own."""
    recipe = small.recipe(tiny_bert, data)
    workspace, _ = small.workspace_of(recipe)
    assert workspace.client_with(0, {}).model is workspace.client_with(3, {}).model
    state = State(workspace.tunable.read())
    assert Update.of(state.shared).weight == 1.0


def test_a_chain_that_chooses_says_what_and_why(tiny_bert: Path, data: Path, tmp_path: Path) -> None:
    recipe = small.recipe(tiny_bert, data, chain=[{"step": "auto", "ratio": 16.0}])
    _, _, events = small.play(recipe, tmp_path)
    said = [e for e in events if isinstance(e, Chose)]
    assert len(said) == 12 and all("kurtosis" in e.text and "because" in e.text for e in said)


DELTA = {"chain": [{"step": "quantize", "bits": 8}], "downlink": {"step": "delta"}}


def test_a_client_that_lost_what_it_held_is_given_the_whole_state(
    tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    """Client 1 forgets after round 1; the change of round 2 means nothing to it, so it is asked again in the
    same round."""
    recipe = small.recipe(tiny_bert, data, **DELTA)

    _, result, events = small.play(recipe, tmp_path / "a", carry=small.forgetful(1, 2))
    down = {e.client: e.down_bytes for e in events if isinstance(e, ClientDone) and e.round == 2}
    assert result["left_out"] == 0 and down[1] > down[0] + 4 * result["trainable"]
    assert result["state_sha256"] == sha(
        recipe, tmp_path / "b"
    )  # quantize keeps no residual, so nothing else was lost


def test_a_second_answer_is_told_and_dropped(tiny_bert: Path, data: Path, tmp_path: Path) -> None:
    recipe = small.recipe(tiny_bert, data)

    def echoing(link: Link, workspace: Workspace) -> Transport:
        carry = local_transport(link, workspace.client, workspace.done)
        return lambda asks: [reply for reply in carry(asks) for _ in range(2 if reply.client == 1 else 1)]

    _, result, events = small.play(recipe, tmp_path / "a", carry=echoing)
    assert [e.code for e in events if type(e).__name__ == "ClientLeftOut"] == ["W605"] * 3  # type: ignore[attr-defined]
    assert result["state_sha256"] == sha(recipe, tmp_path / "b") and result["left_out"] == 0


def test_a_missing_answer_is_a_failure_of_that_client_alone(
    tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    recipe = small.recipe(tiny_bert, data)

    def losing(link: Link, workspace: Workspace) -> Transport:
        carry = local_transport(link, workspace.client, workspace.done)
        return lambda asks: [reply for reply in carry(asks) if reply.client != 1]

    _, result, events = small.play(recipe, tmp_path, carry=losing)
    assert result["left_out"] == 3 and {e.client for e in events if isinstance(e, ClientDone)} == {0, 2, 3}

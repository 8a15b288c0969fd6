"""Runs on bases in 4 and 8 bits: nothing but memory tells the sites of one federation apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedtune.config import method_of
from fedtune.events import Event, RoundDone
from fedtune.model.export import load_adapter
from fedtune.model.score import score
from fedtune.runtime.checkpoints import ClientStates
from fedtune.runtime.client_half import respond
from fedtune.runtime.folder import create
from fedtune.runtime.protocol import Link
from fedtune.runtime.run import run
from fedtune.runtime.workspace import Workspace, build_workspace, link_of
from tests import small


def test_sites_of_unlike_loads_are_one_federation(tiny_bert: Path, data: Path, tmp_path: Path) -> None:
    """Four clients, each with a base of its own kind; the state is everybody's."""
    recipe = small.recipe(tiny_bert, data, rounds=2, chain=[{"step": "quantize", "bits": 8}])
    hows = ({}, {"dtype": "bfloat16"}, {"load": "8bit"}, {"load": "4bit", "dtype": "bfloat16"})
    sites = []
    for how in hows:
        mine = recipe.model_copy(update={"model": recipe.model.model_copy(update=how)})
        method = method_of(mine)
        place = build_workspace(mine, method, ClientStates(None), lambda event: None)
        sites.append((place, link_of(place, method, recipe)))
    assert len({link.base for _, link in sites}) == 1

    def carry(link: Link, workspace: Workspace) -> Any:
        def transport(asks: Any) -> Any:
            for ask in asks:
                place, own = sites[ask.client]
                client = place.client(ask)
                yield respond(own, client, ask)
                place.done(ask, client)

        return transport

    folder, result, _ = small.play(recipe, tmp_path, carry=carry)
    assert result["rounds"] == 2 and np.isfinite(result["federated"])
    for place, _ in sites:
        tunable = load_adapter(place.base, folder.path / "adapter")
        assert np.isfinite(score(tunable, place.test(), 8).loss)


RUNS: dict[str, dict[str, Any]] = {
    "starts": {"method__head_start": "lda", "method__lora_start": "eva"},
    "experts": {
        "method__type": "experts",
        "method__experts": {"by": "given", "groups": ["a", "a", "b", "b"], "warm_up": 1, "min_clients": 2},
    },
    "together": {"method__train": {"lr": 0.01, "steps": 2, "batch": 4, "together": 2}},
    "private": {
        "method__train": {"lr": 0.01, "steps": 2, "batch": 4, "private": {"max_grad_norm": 1.0}},
        "method__weight": "equal",
    },
}


@pytest.mark.thorough
@pytest.mark.parametrize("kind", RUNS)
def test_the_same_recipe_gives_the_same_bytes(tiny_bert: Path, data: Path, tmp_path: Path, kind: str) -> None:
    """A resumed run's, too; of private training, whose draws are secret, that it runs."""
    recipe = small.recipe(tiny_bert, data, rounds=2, model__load="4bit", **RUNS[kind])
    result = small.play(recipe, tmp_path / "one")[1]
    assert result["rounds"] == 2 and np.isfinite(result["federated"])
    if kind == "private":
        return
    again = create(tmp_path / "again", "", "run")
    again.write_json("config.json", recipe.model_dump(mode="json"))
    with pytest.raises(KeyboardInterrupt):
        run(recipe, again, interrupted)
    assert run(recipe, again, lambda event: None)["state_sha256"] == result["state_sha256"]
    if kind == "starts":
        full = small.recipe(tiny_bert, data, rounds=2, **RUNS[kind])
        assert small.play(full, tmp_path / "full")[1]["state_sha256"] != result["state_sha256"]


def interrupted(event: Event) -> None:
    """Somebody ends the run behind its first round."""
    if isinstance(event, RoundDone):
        raise KeyboardInterrupt

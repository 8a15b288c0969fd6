"""A site holds the base as it can: in another type or in fewer bits than the coordinator, and is one of its federation
all the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedtune.deploy.site_config import SiteConfig, with_own_model
from fedtune.errors import FedtuneError
from tests import small
from tests.deploy.inside import FakeGrid, inside

pytestmark = pytest.mark.usefixtures("quick")


def test_three_sites_hold_it_in_three_ways(tiny_bert: Path, data: Path, tmp_path: Path) -> None:
    with inside(tmp_path, tiny_bert, data, rounds=1) as made:
        hows = {"site-a": {"load": "4bit"}, "site-b": {"load": "8bit", "dtype": "bfloat16"}, "site-c": {}}
        workers = [made.worker(site, **how) for site, how in hows.items()]
        made.conduct(FakeGrid({101 + number: worker for number, worker in enumerate(workers)}))
        result = made.folder.read_json("result.json")
        assert (
            result["rounds"] == 1 and "ClientLeftOut" not in (made.folder.path / "events.jsonl").read_text()
        )
        held = [worker.built[1].base.load for worker in workers if worker.built]
        assert held == ["4bit", "8bit", "full"]


def test_what_a_site_cannot_do_in_fewer_bits_is_said(tiny_bert: Path, data: Path) -> None:
    recipe = small.recipe(tiny_bert, data, method__adapter={"kind": "bias"})
    own = SiteConfig("keys", "localhost:1", "home", "socket", load="4bit")
    with pytest.raises(
        FedtuneError, match=r"C104.*load = '4bit' with method.adapter.kind = 'bias'.*set --load"
    ):
        with_own_model(recipe, own)

"""SIGKILL at every step of a masked sum, of the run's process and of a site's worker: somebody starts it again, and
the bytes are those of an undisturbed run, which are those of a run without masks."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.deploying import SITES, Deployment, point
from tests.e2e.faults.conftest import Oracle
from tests.waiting import LONG, wait_for

STEPS = ("train.keys", "train.shares", "train.peers", "train", "train.opening")  # all of one round
POINTS = {  # where the process that dies is: the answers are there; secrets are kept, and nothing has left
    "serverapp": ("fedtune.exchange.server_store:ServerStore.close_round", "args[3] == {!r}"),
    "worker": ("fedtune.deploy.site_books:note_sent", "args[1].verb == {!r}"),
}
MASK, RING = ({"rounds": 1, "chain": [{"step": step}]} for step in ("mask", "ring"))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("victim", POINTS)
def test_a_process_killed_at_every_step_of_a_masked_sum_changes_no_byte(
    victim: str, federation: Deployment, oracle: Oracle, tmp_path: Path
) -> None:
    at, when = POINTS[victim]
    points = [point(at, tmp_path / step, "before", when.format(step)) for step in STEPS]
    federation.serve(oracle.recipe(federation, **MASK), points=points if victim == "serverapp" else ())
    for site in SITES:
        federation.join(site, points=points if victim == "worker" else ())  # whoever comes first
    wait_for(lambda: federation.running["server"].poll() == 0, "the run's end", 2 * LONG, every=0.1)
    assert {*STEPS} <= {path.name for path in tmp_path.iterdir()}
    result = federation.folder("run").read_json("result.json")
    assert result["state_sha256"] == oracle(**RING)[1]["state_sha256"] == oracle(**MASK)[1]["state_sha256"]
    assert result["left_out"] == 0

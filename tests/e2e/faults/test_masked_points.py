"""SIGKILL at every step of masked sums, of the run's process and of a site's worker: somebody starts it again, and the
bytes are those of an undisturbed run, which are those of a run without masks."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.deploying import SITES, Deployment, point
from tests.e2e.faults.conftest import Oracle
from tests.waiting import LONG, wait_for

STEPS = ("train.keys", "train.shares", "train.peers", "train", "train.opening")  # one a round
ROUNDS = len(STEPS)
CLOSED = "fedtune.exchange.server_store:ServerStore.close_round"
DONE = "fedtune.deploy.worker:save_versions"  # in a worker: secrets are kept, nothing has left
MASK, RING = ({"rounds": ROUNDS, "chain": [{"step": step}]} for step in ("mask", "ring"))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("victim", ["serverapp", "worker"])
def test_a_process_killed_at_every_step_of_a_masked_sum_changes_no_byte(
    victim: str, federation: Deployment, oracle: Oracle, tmp_path: Path
) -> None:
    points = [
        point(CLOSED, tmp_path / step, "before", f"args[2] == {n} and args[3] == {step!r}", kill=[victim])
        for n, step in enumerate(STEPS, 1)
    ]
    dies = [point(DONE, tmp_path / f"in-{n}", "after", f"calls == {n}") for n in (2, 9)]
    federation.serve(oracle.recipe(federation, **MASK), points=points)
    for site in SITES:
        federation.join(site, points=dies if victim == "worker" else ())
    wait_for(lambda: federation.running["server"].poll() == 0, "the run's end", 2 * LONG, every=0.1)
    assert {*STEPS} <= {path.name for path in tmp_path.iterdir()}
    result = federation.folder("run").read_json("result.json")
    assert result["state_sha256"] == oracle(**RING)[1]["state_sha256"] == oracle(**MASK)[1]["state_sha256"]
    assert result["left_out"] == 0

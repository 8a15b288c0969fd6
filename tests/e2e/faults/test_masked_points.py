"""SIGKILL at every step of a masked sum, of the run's process and of a site's worker: somebody starts it again, and
the bytes are those of an undisturbed run, which are those of a run without masks. A site that nobody starts again is
lost at that step, and the sum is the plain one of the others."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests import small
from tests.e2e.deploying import SITES, Deployment, deployed, held, point, signalled
from tests.e2e.faults.conftest import Oracle
from tests.runtime.test_masked import losing
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


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("step", STEPS)
def test_one_of_four_sites_lost_for_good_leaves_the_plain_sum_of_those_who_answered(
    step: str, tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    """Its client and all that it has started are killed when it is about to send its answer to a step."""
    sites, at, when = (*SITES, "site-d"), *POINTS["worker"]
    changes = {"partition__clients": 4, "rounds": 1}
    few = {"deploy__quorum": 0.75, "deploy__deadline": 60.0}
    with deployed(tmp_path / "sites", sites) as federation:
        federation.serve(
            federation.recipe("run", tiny_bert, data, chain=[{"step": "mask"}], **changes, **few)
        )
        for site in SITES:
            federation.join(site)
        with held(at, tmp_path, when=when.format(step)) as stands:
            federation.join("site-d", points=[stands])
            federation.wait(Path(stands["marker"]).exists, f"site-d, about to answer {step}")
            for pid in federation.pids(who="site-d"):
                signalled(pid, signal.SIGKILL)
        federation.running.pop("site-d").wait()
        assert federation.ended() == 0
        result = federation.folder("run").read_json("result.json")
    carry = losing({} if step == "train.opening" else {"train": {3}})
    recipe = small.recipe(tiny_bert, data, chain=[{"step": "ring"}], **changes)
    _, plain, _ = small.play(recipe, tmp_path / "local", carry=carry)
    assert result["state_sha256"] == plain["state_sha256"]
    assert result["left_out"] == int(step != "train.opening")

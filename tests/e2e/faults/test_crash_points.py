"""SIGKILL at named points of a round, for every process that can be there; somebody starts it again, and the
bytes are those of an undisturbed run.

The points are in the process that conducts the run (flwr-serverapp) and in the gateway; at each, all processes
of one role are killed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.e2e.deploying import SITES, Deployment, point
from tests.e2e.faults.conftest import Oracle
from tests.waiting import LONG, wait_for

POINTS = {  # one a round, so that one run shows them all: name -> where, when
    "before-open": ("fedtune.exchange.server_store:ServerStore.open_round", "before", "args[2] == 1"),
    "after-open": ("fedtune.exchange.server_store:ServerStore.open_round", "after", "args[2] == 2"),
    "mid-upload": (
        "fedtune.exchange.uploads:Uploads.take",
        "before",
        "args[1].envelope.round == 3",
    ),  # the gateway has said yes, nothing is there
    "after-last-update": ("fedtune.exchange.server_store:ServerStore.close_round", "before", "args[2] == 4"),
    "mid-aggregate": (
        "fedtune.runtime.cohort:decode",
        "before",
        "args[1].round == 5 and args[1].client == 1",
    ),
    "mid-checkpoint": (
        "fedtune.runtime.journal:Journal.commit",
        "before",
        "args[1] == 6",
    ),  # the state is in its place, no row says so
    "after-commit": ("fedtune.runtime.journal:Journal.commit", "after", "args[1] == 7"),
}
ROUNDS = len(POINTS)


def points(folder: Path, victims: list[str]) -> list[dict[str, Any]]:
    return [
        point(at, folder / name, moment, when, kill=victims) for name, (at, moment, when) in POINTS.items()
    ]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "victim",
    [
        "serverapp",
        "gateway",
        "superlink",
        "superexec",
        "supernode",
        "worker",
        "clientapp",
        "server",
        "client",
    ],
)
def test_a_process_killed_at_every_point_of_a_round_changes_no_byte(
    victim: str, federation: Deployment, oracle: Oracle, tmp_path: Path
) -> None:
    recipe = oracle.recipe(federation, rounds=ROUNDS)
    (tmp_path / "points").mkdir()
    told = points(tmp_path / "points", [victim])
    federation.serve(recipe, points=told)
    federation.join_all()

    def done() -> bool:
        """Started again by hand are those whom nobody looks after; on a real machine that is systemd's
        work."""
        if victim == "client":
            for site in SITES:
                if federation.running[site].poll() is not None:
                    federation.join(site)
        if federation.running["server"].poll() not in (None, 0):
            assert victim == "server", f"the server ended with {federation.running['server'].poll()}"
            federation.serve(recipe, points=told)
        return federation.running["server"].poll() == 0

    wait_for(done, "the run's end", 2 * LONG, every=0.1)
    assert {path.name for path in (tmp_path / "points").iterdir()} == set(POINTS)
    oracle.same(federation, rounds=ROUNDS)

"""How many threads torch gets, and that those that wait sleep soon."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fedtune import config
from fedtune.errors import FedtuneError
from fedtune.threads import available_cores, cpu_quota, own_groups, threads_for


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_a_recipe_comes_before_the_environment_and_that_before_the_cores(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert threads_for(5) == (5, "model.threads")
    assert threads_for(0) == (3, "OMP_NUM_THREADS")
    for nothing in ("", "0", "many", "-1"):
        monkeypatch.setenv("OMP_NUM_THREADS", nothing)
        assert threads_for(0)[0] == available_cores()
    monkeypatch.setenv(
        "OMP_NUM_THREADS", "4,2"
    )  # OpenMP's form for nested regions: the first number is the outermost
    assert threads_for(0)[0] == 4


def test_no_more_cores_than_affinity_allows() -> None:
    program = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); from fedtune.threads import "
        "available_cores; print(available_cores())"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=True
        ).stdout.strip()
        == "1"
    )


def test_the_quota_of_a_group_is_the_least_of_it_and_its_ancestors(tmp_path: Path) -> None:
    write(tmp_path / "a/b/cpu.max", "max 100000\n")
    write(tmp_path / "a/cpu.max", "150000 100000\n")
    assert cpu_quota(tmp_path, {"": "/a/b"}) == 1.5
    assert cpu_quota(tmp_path, {"": "/elsewhere"}) is None
    write(tmp_path / "cpu.max", "400000 100000\n")
    assert cpu_quota(tmp_path, {"": "/of/the/host"}) == 4.0  # a container sees its own group at the root
    write(tmp_path / "a/cpu.max", "rubbish\n")
    assert cpu_quota(tmp_path, {"": "/a/b"}) == 4.0


def test_the_quota_of_version_one(tmp_path: Path) -> None:
    write(tmp_path / "cpu/job/cpu.cfs_quota_us", "250000\n")
    write(tmp_path / "cpu/job/cpu.cfs_period_us", "100000\n")
    assert cpu_quota(tmp_path, {"cpu": "/job"}) == 2.5
    write(tmp_path / "cpu/job/cpu.cfs_quota_us", "-1\n")
    assert cpu_quota(tmp_path, {"cpu": "/job"}) is None


def test_own_groups_of_both_versions(tmp_path: Path) -> None:
    write(tmp_path / "cgroup", "12:cpu,cpuacct:/docker/1f\n0::/user.slice\n")
    assert own_groups(tmp_path / "cgroup") == {
        "cpu": "/docker/1f",
        "cpuacct": "/docker/1f",
        "": "/user.slice",
    }
    assert own_groups(tmp_path / "absent") == {}


@pytest.mark.parametrize(
    ("given", "seen"),
    [({}, "1000"), ({"GOMP_SPINCOUNT": "77"}, "77"), ({"OMP_WAIT_POLICY": "active"}, "None")],
)
def test_waiting_threads_sleep_soon_unless_the_user_decided(given: dict[str, str], seen: str) -> None:
    clean = {
        name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    }
    program = "import fedtune, os; print(os.environ.get('GOMP_SPINCOUNT'))"
    assert (
        subprocess.run(
            [sys.executable, "-c", program], env=clean | given, capture_output=True, text=True, check=True
        ).stdout.strip()
        == seen
    )


def test_a_number_of_threads_that_no_machine_has_is_refused() -> None:
    """One beyond a C integer was an unforeseen error at a site, and a smaller one a million threads."""
    for many in (1025, 10**6, 10**30):
        with pytest.raises(FedtuneError, match=r"model\.threads"):
            config.read(None, [f"model.threads={many}"])

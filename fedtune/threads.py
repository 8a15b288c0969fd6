"""How many threads torch gets, and how they wait for one another. No torch here: both are decided before it
is imported."""

from __future__ import annotations

import os
from pathlib import Path

GROUPS = Path("/sys/fs/cgroup")
WAITING = (
    "OMP_WAIT_POLICY",
    "GOMP_SPINCOUNT",
)  # whoever sets one of these has decided how OpenMP's threads wait

# How often a thread of OpenMP looks for work before it sleeps. GNU OpenMP's own default is some 300,000
# times, a few milliseconds: beside any
# other busy process, threads that wait then take the cores from those that work. Three rounds of the built-in
# run on two cores, two runs at
# once: 440 s each with the default, 77 s with this one; alone the short wait costs nothing that can be
# measured (benchmarks/threads.py).
SPINS = 1000


def shorten_spinning() -> None:
    """Let OpenMP's threads sleep soon when they wait. Has an effect only before torch is imported; what the
    user has set stays."""
    if not any(name in os.environ for name in WAITING):
        os.environ["GOMP_SPINCOUNT"] = str(SPINS)


def threads_for(asked: int) -> tuple[int, str]:
    """How many threads torch gets, and why: as asked, else OMP_NUM_THREADS, else the cores that this process
    may use.

    The number depends on settings and limits alone, never on how busy the machine is, because the bits of a
    sum may depend on it.
    """
    if asked:
        return asked, "model.threads"
    wanted = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    if wanted.isdigit() and int(wanted):
        return int(wanted), "OMP_NUM_THREADS"
    return available_cores(), "all cores that this process may use"


def describe_threads(asked: int) -> str:
    """The same in words.

    >>> describe_threads(1)
    '1 thread (model.threads)'
    """
    count, why = threads_for(asked)
    return f"{count} thread{'s' * (count != 1)} ({why})"


def available_cores() -> int:
    """Cores that this process may keep busy: its affinity, or less where the CPU quota of its control group
    is less."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota(GROUPS, own_groups())
    return cores if quota is None else max(1, min(cores, int(quota)))


def own_groups(path: Path = Path("/proc/self/cgroup")) -> dict[str, str]:
    """Controller -> this process's control group ("" is the controller of version 2); empty where the system
    has none."""
    try:
        lines = [line.split(":", 2) for line in path.read_text().splitlines()]
    except OSError:
        return {}
    return {
        controller: group
        for _, controllers, group in (line for line in lines if len(line) == 3)
        for controller in controllers.split(",")
    }


def cpu_quota(root: Path, groups: dict[str, str]) -> float | None:
    """CPUs that the control groups allow, the least of a group and its ancestors; None where there is no
    limit."""
    found: list[float] = []
    for controller, folder, read in (("", root, read_cpu_max), ("cpu", root / "cpu", read_cfs_quota)):
        if controller in groups:
            group = folder / groups[controller].lstrip("/")
            # in a container the path is the host's and is not there: the limit then stands at the root that
            # the container sees
            found += [
                limit
                for place in (group, *group.parents)
                if place.is_relative_to(folder) and (limit := read(place)) is not None
            ]
    return min(found, default=None)


def read_cpu_max(group: Path) -> float | None:
    """Version 2: cpu.max holds "quota period" in microseconds, or "max period"."""
    try:
        quota, period = (group / "cpu.max").read_text().split()
        return int(quota) / int(period)
    except (OSError, ValueError):
        return None


def read_cfs_quota(group: Path) -> float | None:
    """Version 1: two files, and a quota of -1 is no limit."""
    try:
        quota, period = (
            int((group / name).read_text()) for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us")
        )
    except (OSError, ValueError):
        return None
    return quota / period if quota > 0 and period > 0 else None

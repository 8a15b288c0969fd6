"""What this machine can do for a model: its device and the memory that is free on it."""

from __future__ import annotations

import contextlib
import functools
import os
import time
from pathlib import Path
from typing import Any

import torch

from fedtune.model.device import pick_device
from fedtune.threads import available_cores

GROUP = Path("/sys/fs/cgroup")
# of control groups, 2 and 1: a process's limit, what it uses, and what of that is cached files that may go
KINDS = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    (
        "memory/memory.limit_in_bytes",
        "memory/memory.usage_in_bytes",
        "memory/memory.stat",
        "total_inactive_file",
    ),
)
SIDE, TURNS = 512, 8  # of the matrices that are multiplied to see how fast a device is


def means(device: str = "") -> dict[str, Any]:
    """device (as it would be taken), devices (CUDA), memory (bytes free for a model there), cores. Raises
    M301."""
    chosen = pick_device(device or "auto")
    known: dict[str, Any] = {
        "device": str(chosen),
        "devices": gpu_count(),
        "cores": available_cores(),
    }
    if chosen.type == "cuda":
        return known | {
            "name": torch.cuda.get_device_name(chosen),
            "memory": int(torch.cuda.mem_get_info(chosen)[0]),
        }
    return known | {"memory": free_memory()}


def gpu_count() -> int:
    """CUDA devices of this machine, as far as this process may see them."""
    return int(torch.cuda.device_count())


@functools.cache
def speed(device: str = "") -> float:
    """10^9 float32 operations a second in matrix products, taken once, in some 10 ms: it tells a phone from a
    server and is not good for more. Raises M301."""
    factor = torch.ones(SIDE, SIDE, device=pick_device(device or "auto"))
    times = []
    for _ in range(3):  # the first one warms up
        began = time.perf_counter()
        for _ in range(TURNS):
            product = factor @ factor
        product[0, 0].item()  # waits for the device
        times.append(time.perf_counter() - began)
    return 2 * SIDE**3 * TURNS / min(times) / 1e9


def free_memory() -> int:
    """Bytes of main memory that a process may still take: the machine's, or less where its control group
    allows less."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(OSError, KeyError, ValueError):  # no Linux
        free = fields("/proc/meminfo")["MemAvailable"] * 1024
    for limit, used, stat, cached in KINDS:
        with contextlib.suppress(OSError, KeyError, ValueError):  # no such control group, or "max"
            left = (
                int((GROUP / limit).read_text())
                - int((GROUP / used).read_text())
                + fields(GROUP / stat)[cached]
            )
            free = max(0, min(free, left))
    return free


def fields(path: str | Path) -> dict[str, int]:
    """Lines of a name and a number."""
    return {
        words[0].rstrip(":"): int(words[1])
        for line in Path(path).read_text().splitlines()
        if len(words := line.split()) > 1
    }


def use_threads(count: int) -> None:
    """So many threads for torch, from here on."""
    torch.set_num_threads(count)

"""What a recipe's model, tokenizer and chat template may take of time and memory at a site: programs of their
author, which loop, backtrack or allocate as they like.

The worker says that it is at something and, while it gets on, that it lives; fedtune client, a process of its
own, looks, and ends a worker that does not: a thread beside a loop in C would never be run. The next life of
the worker finds what ended the one before, and refuses it from then on. Two files, in the folder of the
worker's socket, which is new with each life of fedtune client:

    attempt.json   what is being done now; its time of change is the last sign of life
    refused.json   what -> why it is not tried again
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import resource
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedtune.disk import write_atomic
from fedtune.errors import ClientFailed

ATTEMPT, REFUSED = "attempt.json", "refused.json"
STILL = 600.0  # seconds without a sign of life; a step takes a fraction of one, on a busy machine a few
PACE = 2 << 20  # bytes of weights that the slowest disk reads in a second
DEATHS = 2  # in a row, of the worker in the middle of something, after which that is not tried again
KEPT = 256  # things that are refused, the newest
OFTEN = 0.5  # seconds between two signs of life
SPARE = 1 << 30  # bytes that a process maps and never touches: stacks of threads, arenas


@dataclass
class Watchdog:
    """The worker's end. One thing at a time."""

    folder: Path
    deaths: dict[str, int] = field(default_factory=dict)
    said: float = 0.0

    def __post_init__(self) -> None:
        """What the life before did not get done, it died of."""
        found = read(self.folder / ATTEMPT)
        if key := str(found.get("key", "")):
            self.deaths = {key: int(found.get("deaths", 0)) + 1}
            if self.deaths[key] >= DEATHS:
                refuse(self.folder, key, f"it ended this site's worker {DEATHS} times")
        (self.folder / ATTEMPT).unlink(missing_ok=True)

    @contextlib.contextmanager
    def bounded(self, what: str, seconds: float, memory: int = 0) -> Iterator[None]:
        """Something that may take so long without a sign of life, and so many bytes more than now (0: as many
        as it likes). Raises ClientFailed M311 where it was too much before, or the memory is."""
        key = hashlib.sha256(what.encode()).hexdigest()
        if why := read(self.folder / REFUSED).get(key):
            raise too_much(what, str(why))
        (self.folder / ATTEMPT).write_text(
            json.dumps({"key": key, "seconds": seconds, "deaths": self.deaths.get(key, 0)})
        )
        try:
            with most_memory(memory):
                yield
            self.deaths.pop(key, None)  # what gets done is not what ends the worker
        except MemoryError:
            raise too_much(
                what, f"it wants more than the {memory >> 20} MiB of memory that are free"
            ) from None
        finally:
            (self.folder / ATTEMPT).unlink(missing_ok=True)

    def alive(self) -> None:
        """A sign of life, as often as somebody likes to give one."""
        if (now := time.monotonic()) > self.said + OFTEN:
            self.said = now
            with contextlib.suppress(OSError):
                os.utime(self.folder / ATTEMPT)


def too_much(what: str, why: str) -> ClientFailed:
    return ClientFailed(
        "M311",
        sentence=f"{what} was stopped at this site: {why}",
        do="take another model, or start the site again to let it try once more",
    )


@contextlib.contextmanager
def most_memory(more: int) -> Iterator[None]:
    """At most so many bytes more than now for this process (its data, which files and devices are not)."""
    if not more:
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    most = data_now() + more + SPARE
    bounds = [limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_DATA, (min([most, *bounds]), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def data_now() -> int:
    """Bytes of data that this process has mapped; 0 where the system does not say."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmData:"))
    except (OSError, StopIteration, ValueError):
        return 0


def first_to_go() -> None:
    """Where memory runs out, the kernel ends this process before any other."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("500")


def overdue(folder: Path) -> str:
    """For whoever looks after the worker: why it has to be ended now, "" where it has not. It is not tried
    again then."""
    try:
        still = time.time() - (folder / ATTEMPT).stat().st_mtime
    except OSError:
        return ""
    found = read(folder / ATTEMPT)
    if not found or still < float(found.get("seconds", STILL)):
        return ""
    why = f"no progress in {still:.0f} s"
    refuse(folder, str(found.get("key", "")), why)
    (folder / ATTEMPT).unlink(missing_ok=True)  # its next life has not begun anything yet
    return why


def refuse(folder: Path, key: str, why: str) -> None:
    known = {name: text for name, text in read(folder / REFUSED).items() if name != key}
    newest = dict([*known.items(), (key, why)][-KEPT:])
    write_atomic(folder / REFUSED, json.dumps(newest).encode())


def read(path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return tree if isinstance(tree, dict) else {}


def weights_at(place: Path) -> int:
    """Bytes of the model files in a folder; 0 for a name on the hub, whose files are read as fast."""
    return sum(path.stat().st_size for path in place.glob("*.safetensors")) if place.is_dir() else 0

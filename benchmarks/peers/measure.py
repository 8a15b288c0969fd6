"""Run one command with everything it starts and print, as JSON, what it cost. A process of its own, since it takes in
orphans (Linux: PR_SET_CHILD_SUBREAPER), so that daemons count, too.

    python measure.py --marks FILE TEXT [--kill-at N] [--timeout S] -- COMMAND...

--marks     training has begun when the text is in the file
--kill-at   SIGKILL to all processes when it is there N times

CPU seconds are those of reaped processes or, where something else reaps them (Ray), as they were last seen, a tenth of
a second before. Memory is the largest sum of proportional set sizes (PSS), so that shared pages count once.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

SUBREAPER, EVERY = 36, 0.1  # of prctl; seconds between looks at CPU times, memory is asked for at every fifth


class Tree:
    """All descendants of this process, from the first look to the last."""

    def __init__(self) -> None:
        self.me = psutil.Process()
        self.seen: dict[tuple[int, float], float] = {}
        self.peak = self.most = 0
        self.reaped = 0.0
        self.codes: dict[int, int] = {}

    @property
    def cpu(self) -> float:
        return max(self.reaped, sum(self.seen.values()))

    def look(self, memory: bool) -> None:
        total, found = 0, self.me.children(recursive=True)
        for one in found:
            with contextlib.suppress(psutil.Error):
                times = one.cpu_times()
                self.seen[one.pid, one.create_time()] = times.user + times.system
                total += one.memory_full_info().pss if memory else 0
        self.peak, self.most = max(self.peak, total), max(self.most, len(found))

    def reap(self) -> bool:
        """Take in whoever has ended; whether anybody is left."""
        with contextlib.suppress(ChildProcessError):
            while True:
                pid, status, used = os.wait4(-1, os.WNOHANG)
                if pid == 0:
                    return True
                self.reaped += used.ru_utime + used.ru_stime
                self.codes[pid] = os.waitstatus_to_exitcode(status)
        return False

    def kill(self) -> None:
        for one in self.me.children(recursive=True):
            with contextlib.suppress(psutil.Error):
                one.kill()


def measure(command: list[str], file: Path, text: str, kill_at: int, timeout: float) -> dict[str, Any]:
    tree = Tree()
    ctypes.CDLL(None).prctl(SUBREAPER, 1, 0, 0, 0)
    began, ended, looks, first, killed = time.monotonic(), 0.0, 0, None, False
    process = subprocess.Popen(command, stdout=sys.stderr, stderr=sys.stderr, start_new_session=True)
    while tree.reap():
        now = time.monotonic()
        tree.look(memory=looks % 5 == 0)
        looks += 1
        marks = file.read_text().count(text) if file.exists() else 0
        if marks and first is None:
            first = tree.cpu
        ended = ended or (now if process.pid in tree.codes else 0.0)
        killed = killed or bool(kill_at and marks >= kill_at)
        if killed or now - began > timeout or (ended and now - ended > 6):  # what outlives the command by 6 s
            tree.kill()
        time.sleep(EVERY)
    return {
        "code": tree.codes.get(process.pid),
        "killed": killed,
        "cpu": tree.cpu,
        "start_cpu": first,
        "peak_bytes": tree.peak,
        "processes": tree.most,
        "seconds": (ended or time.monotonic()) - began,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--marks", nargs=2, metavar=("FILE", "TEXT"), required=True)
    parser.add_argument("--kill-at", type=int, default=0)
    parser.add_argument("--timeout", type=float, default=1800.0)
    parser.add_argument("command", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    file, text = options.marks
    print(json.dumps(measure(command, Path(file), text, options.kill_at, options.timeout)))


if __name__ == "__main__":
    main()

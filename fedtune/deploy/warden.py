"""A program that may start others, and they, end together: python -SE warden.py RULES PARENT COMMAND ...

Stands between whoever looks after the program and the program itself, which sandbox.py starts, and ends with
the code that the program ended with. Three things end them all: SIGTERM, the end of PARENT, the end of the
program. Its group gets SIGTERM, and SIGKILL after a while; who has left the group becomes a child of this
process (PR_SET_CHILD_SUBREAPER), and is found as such. Standard library only, and run as a file.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import time
from pathlib import Path

PDEATHSIG, SUBREAPER = 1, 36
GRACE = 3.0  # seconds between SIGTERM and SIGKILL: less than supervisor.stop_all waits for all
LOOK = 0.05
HEARD = (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD)


def ended(program: int) -> bool:
    """Whether the program has ended; it is not collected yet, so that nobody else has its number."""
    return os.waitid(os.P_PID, program, os.WEXITED | os.WNOWAIT | os.WNOHANG) is not None


def strike(group: int, number: signal.Signals) -> None:
    with contextlib.suppress(OSError):  # all have gone
        os.killpg(group, number)


def sweep() -> None:
    """End all children, and theirs as they become ours."""
    listed = Path(f"/proc/self/task/{os.getpid()}/children")
    with contextlib.suppress(OSError):  # a kernel without the list, or no child any more
        while found := listed.read_text().split():
            for child in found:
                os.kill(int(child), signal.SIGKILL)
            os.waitpid(-1, 0)


def main() -> int:
    rules, parent, *command = sys.argv[1:]
    signal.pthread_sigmask(signal.SIG_BLOCK, HEARD)
    libc = ctypes.CDLL(None)
    libc.prctl(PDEATHSIG, signal.SIGTERM)
    libc.prctl(SUBREAPER, 1)
    if os.getppid() != int(parent):
        return 1
    own = os.getpid()
    program = os.fork()
    if not program:
        os.setsid()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, HEARD)
        sandbox = str(Path(__file__).with_name("sandbox.py"))
        os.execv(sys.executable, [sys.executable, "-SE", sandbox, rules, str(own), *command])
    while not ended(program):
        if signal.sigwait(HEARD) != signal.SIGCHLD:
            strike(program, signal.SIGTERM)
            end = time.monotonic() + GRACE
            while not ended(program) and time.monotonic() < end:
                time.sleep(LOOK)
            break
    strike(program, signal.SIGKILL)
    last = os.waitid(os.P_PID, program, os.WEXITED | os.WNOWAIT)
    assert last is not None  # as it is with WNOHANG only
    sweep()
    return last.si_status if last.si_code == os.CLD_EXITED else 128 + last.si_status


if __name__ == "__main__":
    sys.exit(main())

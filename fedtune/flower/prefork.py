"""Flower's SuperExec at a site, and the ClientApps that it starts, as forks of one process that has imported
Flower: python -m fedtune.flower.prefork SOCKET ARGUMENT ... (arguments of flower-superexec).

By itself SuperExec starts Python anew for each message, and importing Flower costs a message more than all
else that passes it on. Nothing else changes: a process for each message, which ends with its SuperExec; the
commands that Flower has installed, found by their names. The `flwr-clientapp` that `supervisor.leashed` puts
first in SuperExec's path asks here by ASK, and starts Flower's own where nobody answers. Linux only.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path

APP, SUPEREXEC = "flwr-clientapp", "flower-superexec"
ASKED = 64 << 10  # bytes of a question, at most: an address, a token, a few flags
PATIENCE = 5.0  # seconds for a question to arrive
PDEATHSIG, SET_NAME = 1, 15  # prctl


def main(arguments: Sequence[str]) -> int:
    """Serve until SuperExec ends; its exit code. In a fork: that of the command which it has become."""
    place, *rest = arguments
    app, superexec = command(APP), command(SUPEREXEC)
    import_module("fedtune.flower.site_app")  # which every ClientApp loads
    if (
        threading.active_count() > 1
    ):  # a fork would lack them: apps are programs of their own, as Flower has it
        os.execvp(SUPEREXEC, [SUPEREXEC, *rest])
    parent = os.getpid()
    with listen(Path(place)) as listener, wakening() as woken:
        if not (first := os.fork()):
            listener.close()
            return become(SUPEREXEC, superexec, rest, parent)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: os.kill(first, signal.SIGTERM))
        while (code := exit_code(first)) is None:
            asked = question(listener, woken)
            if asked is not None and not os.fork():
                listener.close()
                return become(APP, app, asked, parent)
    return code


def command(name: str) -> Callable[[], object]:
    """The function behind an installed command."""
    (found,) = {entry.value: entry for entry in entry_points(group="console_scripts", name=name)}.values()
    made: Callable[[], object] = found.load()
    return made


def become(name: str, run: Callable[[], object], arguments: Sequence[str], parent: int) -> int:
    """In a fork: run a command as if it had been started by its name; it ends with its parent."""
    libc = ctypes.CDLL(None)
    libc.prctl(PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        return 1
    libc.prctl(SET_NAME, name.encode())  # its first 15 bytes
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGCHLD, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = [name, *arguments]
    run()
    return 0


def listen(path: Path) -> socket.socket:
    """A Unix socket for this user alone, at a path that may be longer than the 107 bytes of an address."""
    path.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_PATH | os.O_CLOEXEC)
    before = os.umask(0o177)
    made = socket.socket(socket.AF_UNIX)
    try:
        made.bind(f"/proc/self/fd/{folder}/{path.name}")
    finally:
        os.umask(before)
        os.close(folder)
    made.listen(16)
    return made


# What `flwr-clientapp` runs first: python -SEc ASK SOCKET ARGUMENT ...; 0 where the app has been started.
ASK = (
    "import json, os, socket, sys; folder, name = os.path.split(sys.argv[1]); "
    "call = socket.socket(socket.AF_UNIX); call.settimeout(30); "
    "call.connect('/proc/self/fd/%d/%s' % (os.open(folder, os.O_PATH), name)); "
    "call.sendall(json.dumps(sys.argv[2:]).encode()); call.shutdown(socket.SHUT_WR); "
    "sys.exit(call.recv(1) != b'1')"
)


@contextlib.contextmanager
def wakening() -> Iterator[socket.socket]:
    """A socket that has something to read after every signal, such as that of a child's end."""
    mine, kernels = socket.socketpair()
    with mine, kernels:
        for end in (mine, kernels):
            end.setblocking(False)
        signal.set_wakeup_fd(kernels.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        yield mine


def question(listener: socket.socket, woken: socket.socket) -> list[str] | None:
    """Wait for a question or a signal; the question's arguments, once whoever asks has been told yes."""
    ready, _, _ = select.select([listener, woken], [], [])
    if woken in ready:
        woken.recv(4096)
    if listener not in ready:
        return None
    with contextlib.suppress(OSError, ValueError, RecursionError), listener.accept()[0] as call:
        call.settimeout(PATIENCE)
        said = b""
        while (part := call.recv(4096)) and len(said) <= ASKED:
            said += part
        arguments = json.loads(said[:ASKED])
        if isinstance(arguments, list) and all(isinstance(one, str) for one in arguments):
            call.sendall(b"1")
            return arguments
    return None


def exit_code(first: int) -> int | None:
    """Collect children that have ended; the exit code of `first` where it is among them."""
    while True:
        child, status = os.waitpid(-1, os.WNOHANG)
        if child == first:
            return os.waitstatus_to_exitcode(status) & 0xFF
        if not child:
            return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Programs that are looked after: started, started again when they die, ended with their parent however it
ends."""

from __future__ import annotations

import contextlib
import os
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fedtune.disk import took
from fedtune.errors import CATALOGUE, FedtuneError
from fedtune.flower.prefork import APP, ASK
from fedtune.proxies import spared

FIRST, LONGEST, STEADY = (
    0.5,
    30.0,
    60.0,
)  # seconds: first pause, longest pause, after which a program counts as healthy again
LOG = 16 << 20  # bytes of a log, after which it is begun anew
TRIES = 8  # deaths in a row, none of them after a healthy while
MISTAKE = 2  # exit code of our own programs for what a user has to mend; the sentence is their last line
PARENT = "FEDTUNE_PARENT"
# The kernel sends SIGKILL when the thread that started us ends (prctl PR_SET_PDEATHSIG, kept by exec). A
# small program in between rather than
# a function between fork and exec: a process that has gRPC's threads must not run Python there.
LEASH = (
    "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 9); os.getppid() == int(sys.argv[1]) or sys.exit(1); "
    "os.execvp(sys.argv[2], sys.argv[2:])"
)


# For the environment of a program that serves, before it begins: TLS 1.3 and nothing before it. gRPC for
# Python has no setting for that; this list is of
# TLS 1.2 alone (those of 1.3 are not chosen), and what stands in it needs an RSA certificate, which nobody
# here has: no such handshake comes about.
NEWEST_TLS = {"GRPC_SSL_CIPHER_SUITES": "ECDHE-RSA-AES128-GCM-SHA256"}
SANDBOX, WARDEN = (Path(__file__).with_name(f"{name}.py") for name in ("sandbox", "warden"))
PREFORK = "prefork"  # the socket of fedtune.flower.prefork, beside the apps that ask there


def leashed(folder: Path) -> Path:
    """A folder for the front of the path: Flower's apps, ending with the SuperExec that started them. By
    itself an app whose SuperExec and SuperNode are both gone goes on trying to tell them so for ever (flwr
    1.41). A ClientApp is a fork of the process that serves at PREFORK, where one does."""
    folder.mkdir(parents=True, exist_ok=True)
    python = f"{shlex.quote(sys.executable)} -SEc"
    fork = f'{python} {shlex.quote(ASK)} {shlex.quote(str(folder / PREFORK))} "$@" 2>/dev/null && exit 0\n'
    for name, first in {APP: fork, "flwr-serverapp": ""}.items() if sys.platform == "linux" else ():
        path = folder / name
        real = Path(sys.executable).parent / name
        leash = f'{python} {shlex.quote(LEASH)} $PPID {shlex.quote(str(real))} "$@"'
        path.write_text(f"#!/bin/sh\n{first}exec {leash}\n")
        path.chmod(0o700)
    return folder


def environment(home: Path) -> dict[str, str]:
    """Flower without telemetry and with a home of its own; programs of this interpreter first in the path."""
    here = f"{leashed(home / 'bin')}{os.pathsep}{Path(sys.executable).parent}"
    return (
        os.environ
        | spared(os.environ)
        | {
            "FLWR_HOME": str(home),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.25",
            "GRPC_VERBOSITY": "ERROR",
            **NEWEST_TLS,
            "PATH": f"{here}{os.pathsep}{os.environ.get('PATH', '')}",
            PARENT: str(os.getpid()),
        }
    )


# of a site's environment, what Flower's programs need to start: no passphrase, no token, no name of a place
KEPT = (
    "PATH",
    "LANG",
    "LANGUAGE",
    "TZ",
    "PYTHONPATH",
    "PYTHONHOME",
    "LD_LIBRARY_PATH",
    "OMP_NUM_THREADS",
    "GRPC_VERBOSITY",
    "NO_PROXY",
    "no_proxy",
    PARENT,
)


def bare(env: Mapping[str, str], home: Path) -> dict[str, str]:
    """An environment for Flower's programs at a site: they see neither the user's home nor what the user's
    variables say."""
    kept = {name: value for name, value in env.items() if name in KEPT or name.startswith(("LC_", "FLWR_"))}
    temporary = home / "tmp"
    temporary.mkdir(parents=True, exist_ok=True)
    return kept | {"HOME": str(home), "TMPDIR": str(temporary)}


@dataclass
class Program:
    """One program; its output goes to a log that is begun anew with its first life.

    own    whether it is one of ours: a mistake that ends its first life would end every other
    walls  rules that keep it from the rest of the disk (sandbox.py, JSON), "" for none
    group  whether it may start programs of its own, which end with it (warden.py)
    place  the folder that it is started in; None: ours
    """

    name: str
    command: Sequence[str]
    log: Path
    env: Mapping[str, str]
    own: bool = False
    walls: str = ""
    group: bool = False
    place: Path | None = None
    process: subprocess.Popen[bytes] | None = None
    deaths: int = 0
    lives: int = 0
    _since: float = 0.0
    _again: float = field(default=0.0)

    def look(self) -> None:
        """Start it if it is not there and its pause is over. Raises F505 where it dies again and again, and
        what one of ours ends with at once."""
        now = time.monotonic()
        if self.process is None:
            if now >= self._again:
                self._start(now)
            return
        code = self.process.poll()
        if code is None:
            shorten(self.log)
            return
        self.process = None
        self.deaths = 1 if now - self._since > STEADY else self.deaths + 1
        words = next(iter(self.log.read_text(errors="replace").strip().splitlines()[-1:]), "nothing")
        if self.own and self.lives == 1 and code == MISTAKE and (mistake := read_sentence(words)):
            raise mistake
        if self.deaths > TRIES:
            sentence = (
                f"'{self.name}' stopped {self.deaths} times in a row (code {code}; its last line: "
                f"{words[:200]})"
            )
            raise FedtuneError("F505", sentence=sentence, do=f"look at {self.log}")
        self._again = now + min(LONGEST, FIRST * 2 ** (self.deaths - 1))

    def _start(self, now: float) -> None:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        if not self.lives:
            self.log.write_bytes(b"")
        with self.log.open("ab") as out:  # whoever shortens it finds the end again
            first = ["-SE", str(WARDEN if self.group else SANDBOX), self.walls]
            first = first if self.walls else ["-SEc", LEASH]
            command = (
                [sys.executable, *first, str(os.getpid()), *self.command]
                if sys.platform == "linux"
                else list(self.command)
            )
            self.process = subprocess.Popen(
                command,
                cwd=self.place,
                env=dict(self.env),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
            )
        self._since, self.lives = now, self.lives + 1

    @property
    def started(self) -> float:
        """When its present life began, by the monotonic clock."""
        return self._since

    def restart(self) -> None:
        """SIGKILL; the next look starts it again, without a pause: a death by our hand says nothing of the
        program."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def stop(self, seconds: float = 5.0) -> None:
        """SIGTERM, and SIGKILL after a while."""
        if self.process is None:
            return
        self.process.terminate()
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process = None


def shorten(log: Path) -> None:
    """Begin a log anew where it has grown long, and keep what it was as NAME.1: the program writes on at its
    end, wherever that is."""
    try:
        if log.stat().st_size > LOG:
            shutil.copyfile(log, log.with_name(f"{log.name}.1"))
            os.truncate(log, 0)
    except OSError:  # a full disk: it grows on
        pass


def read_sentence(line: str) -> FedtuneError | None:
    """A mistake from the sentence that it was printed as; None for any other line."""
    parts = re.fullmatch(r"([A-Z]\d{3}): (?:found (.*), expected (.*?)|(.*?)); (.*)\.", line)
    if not parts or parts[1] not in CATALOGUE:
        return None
    return FedtuneError(parts[1], parts[2] or parts[4], parts[3] or "", parts[5])


def stop_all(programs: Sequence[Program], seconds: float = 5.0) -> None:
    """SIGTERM to all, the last started first, and SIGKILL to whoever is still there after a while."""
    for program in reversed(programs):
        if program.process is not None:
            program.process.terminate()
    end = time.monotonic() + seconds
    for program in reversed(programs):
        program.stop(max(0.1, end - time.monotonic()))


@contextlib.contextmanager
def alone(home: Path) -> Iterator[None]:
    """One fedtune at work in a home. Raises F506, R404 for a home that cannot be made."""
    try:
        home.mkdir(parents=True, exist_ok=True)
        handle = (home / "lock").open("a")
    except OSError as error:
        raise FedtuneError(
            "R404",
            sentence=f"cannot write to the folder '{home}' ({error.strerror})",
            do="free space, or choose another folder",
        ) from None
    with handle:
        if not took(handle):
            raise FedtuneError(
                "F506",
                sentence=f"another fedtune is working in '{home}'",
                do="end it, or choose another folder",
            )
        yield


def require_idle(home: Path) -> None:
    """Raises F506 where another fedtune is at work in a home; makes none."""
    if (home / "lock").exists():
        with alone(home):
            pass


class Stopped(Exception):
    """SIGTERM or Ctrl-C."""


def stop_on_signals() -> None:
    """SIGTERM and SIGINT end the program by an exception, so that what it started is stopped too."""

    def stop(number: int, frame: object) -> None:
        raise Stopped

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)


def end_with_parent() -> None:
    """For our own programs: end with the one that looks after this one, where one does."""
    if parent := os.environ.get(PARENT):
        end_with(int(parent))


def end_with(parent: int) -> None:
    """For programs that somebody else's program starts: end when the process `parent` is gone. Looks once a
    second, in a thread."""
    import threading

    def watch() -> None:
        while True:
            time.sleep(1)
            try:
                os.kill(parent, 0)
            except OSError:
                os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def free_port() -> int:
    """A port of loopback that no outgoing connection will take meanwhile: systems give those the numbers from
    32768 on, or higher ones."""
    draw = random.SystemRandom()
    for _ in range(100):
        with (
            contextlib.suppress(OSError),
            socket.create_server(("127.0.0.1", draw.randrange(20_000, 32_768))) as found,
        ):
            return int(found.getsockname()[1])
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


DIRECT = urllib.request.build_opener(
    urllib.request.ProxyHandler({})
)  # our own programs are asked without a proxy


def healthy(url: str) -> bool:
    try:
        with DIRECT.open(url, timeout=2) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError, ValueError):
        return False

"""A site's ClientApps as forks: they are what Flower's own would be, and end with their SuperExec."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedtune.deploy import supervisor
from fedtune.flower.prefork import APP
from tests.waiting import PATIENCE, free_ports, wait_for

SUPEREXEC = "flower-superexe"  # as much of a name as the kernel keeps
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")


class Site:
    """A SuperExec without a SuperNode, and what it would start."""

    def __init__(self, root: Path, **more: str) -> None:
        root /= "a folder's name that is longer than the address of a Unix socket may be " + "x" * 60
        self.env = supervisor.environment(root) | more
        self.app, self.log = root / "bin" / APP, root / "log"
        self.nowhere = f"127.0.0.1:{free_ports(1)[0]}"
        self.place = root / "bin" / supervisor.PREFORK
        exec_ = [sys.executable, "-m", "fedtune.flower.prefork", str(self.place), "--insecure"]
        with self.log.open("w") as out:
            self.process = subprocess.Popen(
                [*exec_, "--runtime-api-address", self.nowhere], env=self.env, stdout=out, stderr=out
            )
        wait_for(lambda: SUPEREXEC in self.names(), "the SuperExec", every=0.1)

    def ask(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [self.app, *arguments], env=self.env, capture_output=True, text=True, timeout=PATIENCE
        )

    def forks(self) -> dict[int, str]:
        """Living children, with their names."""
        found = {}
        for pid in Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split():
            with contextlib.suppress(OSError):  # it has just been collected
                found[int(pid)] = Path(f"/proc/{pid}/comm").read_text().strip()
        return found

    def names(self) -> set[str]:
        return {*self.forks().values(), Path(f"/proc/{self.process.pid}/comm").read_text().strip()}

    def start_app(self) -> int:
        """An app that waits for a SuperNode that never comes."""
        wait_for(lambda: APP not in self.forks().values(), "the end of those before", every=0.1)
        done = self.ask("--insecure", "--runtime-api-address", self.nowhere, "--token", "secret")
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        wait_for(lambda: APP in self.forks().values(), "the app", every=0.1)
        (found,) = [pid for pid, name in self.forks().items() if name == APP]
        return found


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    made = Site(tmp_path)
    yield made
    made.process.kill()
    made.process.wait()


def alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def test_an_app_is_a_fork_that_does_what_the_command_does(site: Site) -> None:
    assert site.ask("--help").stdout == ""  # the fork's words go to the SuperExec's log
    wait_for(lambda: "Run a Flower ClientApp" in site.log.read_text(), "the help text")
    app = site.start_app()
    assert Path(f"/proc/{app}/environ").read_bytes() == Path(f"/proc/{site.process.pid}/environ").read_bytes()
    os.kill(app, signal.SIGKILL)
    wait_for(lambda: app not in site.forks(), "the app, collected")
    assert site.start_app() != app


@pytest.mark.thorough
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_all_end_with_it(site: Site, number: int) -> None:
    site.start_app()
    children = list(site.forks())
    site.process.send_signal(number)
    site.process.wait(PATIENCE)
    wait_for(lambda: not any(map(alive, children)), "the end of its forks")
    assert "Traceback" not in site.log.read_text()


def test_it_ends_with_its_superexec_whose_code_it_has(site: Site) -> None:
    app = site.start_app()
    (first,) = [pid for pid, name in site.forks().items() if name != APP]
    os.kill(first, signal.SIGKILL)
    assert site.process.wait(PATIENCE) == 256 - signal.SIGKILL
    wait_for(lambda: not alive(app), "the app's end")


def test_what_is_no_question_starts_nothing(site: Site) -> None:
    folder = os.open(site.place.parent, os.O_PATH)
    for said in (b"", b"{", b"\xff\xfe", b"7", b"[" * 100_000, b'["' + b"x" * 200_000 + b'"]'):
        with socket.socket(socket.AF_UNIX) as call:
            call.connect(f"/proc/self/fd/{folder}/{site.place.name}")
            try:
                call.sendall(said)
                call.shutdown(socket.SHUT_WR)
                assert call.recv(1) == b""
            except ConnectionError:
                pass
    os.close(folder)
    assert set(site.forks().values()) == {SUPEREXEC} and site.process.poll() is None
    assert site.place.stat().st_mode & 0o077 == 0


def test_where_nobody_serves_the_command_is_flowers_own(tmp_path: Path) -> None:
    env = supervisor.environment(tmp_path)
    done = subprocess.run(
        [tmp_path / "bin" / APP, "--help"], env=env, capture_output=True, text=True, timeout=PATIENCE
    )
    assert "Run a Flower ClientApp" in done.stdout and not done.stderr


@pytest.mark.thorough
def test_where_an_import_starts_a_thread_nothing_is_forked(tmp_path: Path) -> None:
    """A fork would lack it. Flower's programs are then those of their names."""
    (tmp_path / "sitecustomize.py").write_text(
        "import threading, time; threading.Thread(target=time.sleep, args=(600,), daemon=True).start()"
    )
    path = f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    site = Site(tmp_path, PYTHONPATH=path)
    try:
        assert not site.place.exists() and not site.forks()
        assert "Run a Flower ClientApp" in site.ask("--help").stdout
    finally:
        site.process.kill()
        site.process.wait()

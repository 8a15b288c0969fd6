"""A federation of real processes on loopback: `fedtune server` and `fedtune client`, each with a log; `close`
leaves none of them alive."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedtune.runtime.folder import RunFolder
from fedtune.trust.authority import Authority, create
from tests import small
from tests.e2e.faults.crash.roles import ROOT, WHO, processes
from tests.waiting import LONG, PATIENCE, free_ports, wait_for

SITES = ("site-a", "site-b", "site-c")
CRASH = Path(__file__).parent / "faults" / "crash"
MEMORY = {
    "chain": [{"step": "sign", "error_feedback": True}]
}  # what a client did not get to say, it keeps until the next round


def point(at: str, marker: Path, moment: str = "before", when: str = "", **more: Any) -> dict[str, Any]:
    """A named crash point (faults/crash/sitecustomize.py)."""
    return {"at": at, "moment": moment, "when": when, "marker": str(marker), **more}


@contextmanager
def held(at: str, folder: Path, moment: str = "before", when: str = "") -> Iterator[dict[str, Any]]:
    """A point at which a process stands still, once its marker exists, until the block is left: whoever asks
    meanwhile asks a run that has not ended."""
    marker = folder / "held"
    marker.touch()
    try:
        yield point(at, folder / "held-once", moment, when, do=f"gone({str(marker)!r})")
    finally:
        marker.unlink()


@dataclass
class Deployment:
    """One coordinator's machine and three sites'. `running` holds who was started, by name."""

    root: Path
    authority: Authority
    port: int
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @classmethod
    def make(cls, root: Path, sites: Sequence[str] = SITES) -> Deployment:
        authority = create(root / "keys", "hospitals", ["localhost"], 30)
        for site in sites:
            authority.issue(site, 30)
        return cls(root, authority, free_ports(1)[0])

    @property
    def address(self) -> str:
        return f"localhost:{self.port}"

    @property
    def keys(self) -> Path:
        return self.authority.folder

    def recipe(self, name: str, model: Path, data: Path, **changes: Any) -> Path:
        """A recipe whose sites take their parts of one file, so that the same recipe can be played in one
        process."""
        return small.write_recipe(
            self.root / f"{name}.toml",
            model,
            data,
            **{"partition__clients": 3, "deploy__data": "partition", **changes},
        )

    def fedtune(
        self, who: str, *arguments: str, points: Sequence[dict[str, Any]] = (), **more: str
    ) -> subprocess.Popen[bytes]:
        """One program of `who`; its output is added to logs/WHO.log."""
        paths = os.pathsep.join(
            filter(None, [str(CRASH), os.environ.get("PYTHONPATH")])
        )  # the same fedtune as the test's
        env = os.environ | {
            ROOT: str(self.root),
            WHO: who,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": paths,
            **more,
        }
        if points:
            env["FLWR_TEST_CRASH"] = json.dumps(list(points))
        (self.root / "logs").mkdir(exist_ok=True)
        with (self.root / "logs" / f"{who}.log").open("ab") as log:
            command = [sys.executable, "-m", "fedtune", *arguments]
            process = subprocess.Popen(
                command,
                cwd=self.root,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.running[who] = process
        return process

    def serve(
        self, recipe: Path, *more: str, points: Sequence[dict[str, Any]] = (), **env: str
    ) -> subprocess.Popen[bytes]:
        listen = (
            "--keys",
            str(self.keys),
            "--listen",
            f"127.0.0.1:{self.port}",
            "--runs",
            str(self.root / "runs"),
        )
        return self.fedtune("server", "server", str(recipe), *listen, *more, points=points, **env)

    def resume(self, name: str) -> subprocess.Popen[bytes]:
        return self.fedtune("server", "resume", str(self.root / "runs" / name))

    def join(
        self, site: str, *more: str, address: str = "", points: Sequence[dict[str, Any]] = (), **env: str
    ) -> subprocess.Popen[bytes]:
        place = (
            "--server",
            address or self.address,
            "--keys",
            str(self.authority.place(site)),
            "--home",
            str(self.root / f"home-{site}"),
        )
        more = (
            more if {"--data", "--partition"} & set(more) else (*more, "--partition")
        )  # as the recipes above say
        return self.fedtune(site, "client", *place, *more, points=points, **env)

    def join_all(self, **more: Any) -> None:
        for site in SITES:
            self.join(site, **more)

    # --- what is there to see ---

    def folder(self, name: str) -> RunFolder:
        return RunFolder(self.root / "runs" / name)

    def events(self, name: str) -> list[dict[str, Any]]:
        return lines_of(self.folder(name).path / "events.jsonl")

    def worker_events(self, site: str) -> list[dict[str, Any]]:
        return lines_of(self.root / f"home-{site}" / "worker.jsonl")

    def said(self, who: str) -> str:
        """All that a program has told its user."""
        return (self.root / "logs" / f"{who}.log").read_text(errors="replace")

    def pids(self, role: str = "", who: str = "") -> list[int]:
        return [pid for pid, _, _ in processes(str(self.root), role, who)]

    def wait_round(self, name: str, number: int, seconds: float = LONG) -> None:
        """Until a round is committed."""
        self.wait(
            lambda: any(e["event"] == "RoundDone" and e["round"] >= number for e in self.events(name)),
            f"round {number} of {name}",
            seconds,
        )

    def wait_accepted(self, count: int, seconds: float = LONG) -> None:
        """Until the exchange has taken so many updates, over all runs."""
        gateway = self.root / "runs" / ".coordinator" / "gateway.jsonl"
        self.wait(
            lambda: sum(e["event"] == "UpdateAccepted" for e in lines_of(gateway)) >= count,
            f"{count} updates",
            seconds,
        )

    def wait(self, done: Any, what: str, seconds: float = LONG) -> None:
        """Bounded; a server that ended meanwhile ends the wait too. After a long while every process writes
        into its log where it is."""
        begun, asked = time.monotonic(), False

        def either() -> bool:
            nonlocal asked
            if done():
                return True
            if not asked and time.monotonic() > begun + 100:
                asked = True
                self.stacks()
            server = self.running.get("server")
            assert server is None or server.poll() in (None, 0), (
                f"the server ended with {server.poll()} while waiting for {what}"
            )
            return False

        wait_for(either, what, seconds, every=0.2)

    def ended(self, seconds: float = LONG) -> int:
        """The server's exit code, once it has ended."""
        return self.running["server"].wait(seconds)

    def kill(self, role: str, who: str = "", number: int = signal.SIGKILL) -> list[int]:
        """Send a signal to every process of a role; whom it went to."""
        return [pid for pid in self.pids(role, who) if signalled(pid, number)]

    def stacks(self) -> None:
        """Have every Python process write its stacks into its log (faults/crash/sitecustomize.py)."""
        for pid, role, _ in processes(str(self.root)):
            if role and role != "flwr":
                signalled(pid, signal.SIGUSR1)

    # --- the end ---

    def leave(self, who: str, seconds: float = PATIENCE) -> int:
        """SIGTERM to one program, as its user would send it; its exit code."""
        process = self.running.pop(who)
        process.terminate()
        return process.wait(seconds)

    def close(self) -> None:
        """Stop everybody as a user would; then nothing may be alive."""
        for process in self.running.values():
            if process.poll() is None:
                process.terminate()
        for process in self.running.values():
            try:
                process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        end = (
            time.monotonic() + PATIENCE
        )  # those that Flower's programs have started look once a second whether they are alone
        while (left := list(processes(str(self.root)))) and time.monotonic() < end:
            time.sleep(0.2)
        for pid, _, _ in left:
            signalled(pid, signal.SIGKILL)
        assert not left, f"still alive: {left}"

    def logs(self) -> str:
        """The last words of every program."""
        paths = [
            *self.root.glob("logs/*.log"),
            *self.root.glob("runs/.coordinator/logs/*.log"),
            *self.root.glob("home-*/logs/*.log"),
        ]
        return "\n".join(
            f"--- {path.relative_to(self.root)}\n{path.read_text(errors='replace')[-3000:]}"
            for path in sorted(paths)
        )


@contextmanager
def deployed(root: Path, sites: Sequence[str] = SITES) -> Iterator[Deployment]:
    """A deployment that is closed at the end; its logs are printed where the block fails."""
    made = Deployment.make(root, sites)
    try:
        yield made
    except BaseException:
        print(made.logs())
        raise
    finally:
        made.close()


def signalled(pid: int, number: int) -> bool:
    """Whether the process was still there to get the signal."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
        return True
    return False


def lines_of(path: Path) -> list[dict[str, Any]]:
    """Whole lines of a JSONL file."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.split("\n")[:-1]]


def local(root: Path, model: Path, data: Path, **changes: Any) -> tuple[RunFolder, dict[str, Any]]:
    """The same recipe in this process: the oracle."""
    folder, result, _ = small.play(small.recipe(model, data, **{"partition__clients": 3, **changes}), root)
    return folder, result

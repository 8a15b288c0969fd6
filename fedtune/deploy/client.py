"""fedtune client: a site's programs, started and looked after until somebody ends them.

    HOME/spool cache memory   updates without a receipt, states, what the client remembers
    HOME/flower logs          Flower's home and everybody's last words

The coordinator may be away for as long as it likes: the SuperNode asks again, a finished update waits in the spool.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from fedtune.deploy.passage import Passage
from fedtune.deploy.processes import Program, alone, environment, free_port, stop_all
from fedtune.deploy.socket import through
from fedtune.deploy.worker import SiteConfig
from fedtune.errors import CATALOGUE, FedtuneError
from fedtune.exchange.probe import reason
from fedtune.proxies import proxy_for
from fedtune.trust import COORDINATOR, load

LOOK = 0.5
STARTING = 300.0  # seconds that a SuperNode may take to ask its first question: a cold disk, a slow board, a busy machine
STUCK = 60.0  # seconds without a question from the SuperNode while nothing is being done; Flower itself gives a task that long


def attend(config: SiteConfig, say: Callable[[str], None]) -> None:
    """Until an exception ends it (Stopped, F505). Raises T701 to T708 for keys that cannot be used, E802 for a connection that is refused."""
    home = Path(config.home)
    with alone(home):
        identity = load(Path(config.keys))
        if identity.name.name == COORDINATOR:
            raise FedtuneError("T705", f"the coordinator's own keys in '{config.keys}'", "the keys of a site", "name the folder that 'fedtune keys issue' made")
        if why := reason(identity, config.coordinator):
            raise why
        private = short_folder()
        passage = Passage(identity, config.coordinator)
        programs: list[Program] = []
        try:
            own = replace(config, socket=str(private / "worker"))
            programs = site_programs(own, passage.address, private)
            say(f"site '{identity.name.name}' of '{identity.name.federation}', coordinator {config.coordinator}, home {home}")
            away = "there"
            events = home / "worker.jsonl"
            told = Told(events, events.stat().st_size if events.exists() else 0)
            while True:
                for program in programs:
                    program.look()
                if stuck(passage.asked, programs[1].started, own.socket):
                    say(f"Flower's SuperNode has asked for nothing in {time.monotonic() - programs[1].started:.0f} s, while this site had nothing to do: "
                        "it is started again")  # fmt: skip
                    programs[1].restart()
                if (now := standing(passage.last)) != away:
                    away = now
                    say(f"the coordinator is {now}" + (f": {passage.last[:300]}" if passage.last else "") + through_proxy(config.coordinator, now))
                for text in told.lines():
                    say(text)
                time.sleep(LOOK)
        finally:
            stop_all(programs)
            passage.close()
            shutil.rmtree(private, ignore_errors=True)


def short_folder() -> Path:
    """A private folder (0700) for sockets, whose paths may have 107 bytes: where TMPDIR is long, in /tmp."""
    folder = Path(tempfile.mkdtemp(prefix="fedtune-"))
    if len(os.fsencode(folder)) < 90:
        return folder
    folder.rmdir()
    return Path(tempfile.mkdtemp(prefix="fedtune-", dir="/tmp"))


def standing(last: str) -> str:
    """How the coordinator stands to this site, by what came of the last call: gRPC's words change while it is away, a refusal bears a code."""
    code = last.partition(":")[0]
    return f"there, and refuses this site ({code})" if code in CATALOGUE else "away" if last else "there"


def through_proxy(coordinator: str, now: str) -> str:
    """A proxy of the environment is the first thing to look at where nobody answers."""
    proxy = proxy_for(coordinator) if now == "away" else ""
    return f" (connections go through {proxy}; if that is wrong, add the coordinator's name to no_proxy)" if proxy else ""


def stuck(asked: float, started: float, worker: str) -> bool:
    """Whether the SuperNode waits for a ClientApp that is not there.

    It takes one message at a time, and where a message's run ended while it was being answered, or its SuperExec died just then, it waits for
    that answer for ever, its heart beating (flwr 1.41, _push_messages). One that has not asked anything in this life may still be starting.
    """
    patience, since = (STUCK, asked) if asked > started else (STARTING, started)
    if time.monotonic() < since + patience:
        return False
    try:
        return bool(through(worker, {"what": "idle"}, seconds=0.0, patience=5.0)["seconds"] > STUCK)
    except FedtuneError:  # the worker is being started, or stands still
        return False


@dataclass
class Told:
    """What the worker says of its work, read from its events as they come."""

    path: Path
    read: int = 0

    def lines(self) -> list[str]:
        """Texts since the last time; a line that is not whole yet is left for the next."""
        texts: list[str] = []
        if not self.path.exists():
            return texts
        with self.path.open("rb") as file:
            file.seek(self.read)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self.read += len(line)
                with contextlib.suppress(ValueError, KeyError):
                    texts.append(str(json.loads(line)["text"]))
        return texts


def site_programs(config: SiteConfig, superlink: str, private: Path) -> list[Program]:
    """The worker, Flower's SuperNode, and the SuperExec that starts a ClientApp for each message."""
    home = Path(config.home)
    env = environment(home / "flower")
    (home / "flower").mkdir(parents=True, exist_ok=True)
    told = private / "worker.json"
    config.write(told)
    port = free_port()
    node = f'worker="{config.socket}"'
    commands = {
        "worker": (sys.executable, "-m", "fedtune.deploy.worker", str(told)),
        "supernode": ("flower-supernode", "--insecure", "--superlink", superlink, "--host", "127.0.0.1", "--port", str(port), "--isolation", "process",
                      "--node-config", node),
        "superexec": ("flower-superexec", "--insecure", "--runtime-api-address", f"127.0.0.1:{port}"),
    }  # fmt: skip
    return [Program(name, command, home / "logs" / f"{name}.log", env) for name, command in commands.items()]

"""fedtune client: a site's programs, started and looked after until somebody ends them.

    HOME/spool cache memory   updates without a receipt, states, what the client remembers
    HOME/flower logs          Flower's home and everybody's last words

The coordinator may be away for as long as it likes: the SuperNode asks again, a finished update waits in the spool.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from fedtune.deploy.passage import Passage
from fedtune.deploy.processes import Program, alone, environment, free_port, stop_all
from fedtune.deploy.socket import through
from fedtune.deploy.worker import SiteConfig
from fedtune.errors import CATALOGUE, FedtuneError
from fedtune.exchange.probe import reason
from fedtune.trust import load

LOOK = 0.5
STUCK = 60.0  # seconds without a question from the SuperNode while nothing is being done; Flower itself gives a task that long


def attend(config: SiteConfig, say: Callable[[str], None]) -> None:
    """Until an exception ends it (Stopped, F505). Raises T701 to T708 for keys that cannot be used, E802 for a connection that is refused."""
    home = Path(config.home)
    with alone(home):
        identity = load(Path(config.keys))
        if why := reason(identity, config.coordinator):
            raise why
        private = Path(tempfile.mkdtemp(prefix="fedtune-"))  # 0700, and short: a socket's path may have 107 bytes
        passage = Passage(identity, config.coordinator)
        programs: list[Program] = []
        try:
            own = replace(config, socket=str(private / "worker"))
            programs = site_programs(own, passage.address, private)
            say(f"site '{identity.name.name}' of '{identity.name.federation}', coordinator {config.coordinator}, home {home}")
            away = "there"
            while True:
                for program in programs:
                    program.look()
                if stuck(passage, own.socket):
                    say(f"Flower's SuperNode has asked for nothing in {STUCK:.0f} s, while this site had nothing to do: it is started again")
                    programs[1].restart()
                    passage.asked = time.monotonic()
                if (now := standing(passage.last)) != away:
                    away = now
                    say(f"the coordinator is {now}" + (f": {passage.last[:300]}" if passage.last else ""))
                time.sleep(LOOK)
        finally:
            stop_all(programs)
            passage.close()
            shutil.rmtree(private, ignore_errors=True)


def standing(last: str) -> str:
    """How the coordinator stands to this site, by what came of the last call: gRPC's words change while it is away, a refusal bears a code."""
    code = last.partition(":")[0]
    return f"there, and refuses this site ({code})" if code in CATALOGUE else "away" if last else "there"


def stuck(passage: Passage, worker: str) -> bool:
    """Whether the SuperNode waits for a ClientApp that is not there. It takes one message at a time, and where a message's run ended while it was
    being answered, or its SuperExec died just then, it waits for that answer for ever, its heart beating (flwr 1.41, _push_messages)."""
    if time.monotonic() < passage.asked + STUCK:
        return False
    try:
        return bool(through(worker, {"what": "idle"}, seconds=0.0, patience=5.0)["seconds"] > STUCK)
    except FedtuneError:  # the worker is being started, or stands still
        return False


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

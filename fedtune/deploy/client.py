"""fedtune client: a site's programs, started and looked after until somebody ends them.

    HOME/spool cache memory   updates without a receipt, states, what the client remembers
    HOME/flower logs          Flower's home and everybody's last words

The coordinator may be away for as long as it likes: the SuperNode asks again, a finished update waits in the
spool.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedtune.deploy.fleet_proxy import FleetProxy
from fedtune.deploy.policy import read_policy
from fedtune.deploy.script_program import script_program
from fedtune.deploy.site_config import SiteConfig
from fedtune.deploy.supervisor import PREFORK, Program, alone, bare, environment, free_port, stop_all
from fedtune.deploy.walls import walls
from fedtune.deploy.watchdog import overdue
from fedtune.errors import CATALOGUE, FedtuneError
from fedtune.events import Event, event_of
from fedtune.exchange.tls_diagnosis import reason, unreachable
from fedtune.flower.prefork import SUPEREXEC
from fedtune.flower.worker_socket import through
from fedtune.proxies import proxy_for, proxy_hint
from fedtune.trust import COORDINATOR, Identity, renewal
from fedtune.trust.certificates import utc_now
from fedtune.trust.renewal import newest

LOOK = 0.5
HOUR = 3600.0
# seconds that a SuperNode may take to ask its first question: a cold disk, a slow board, a busy machine
STARTING = 300.0
STOPPED = 15.0  # seconds between two looks, after which it was not the SuperNode that kept silent
REASONS = 30.0  # seconds between two questions why no connection comes about
# seconds without a question from the SuperNode while nothing is being done; Flower itself gives a task that
# long
STUCK = 60.0


def attend(
    config: SiteConfig,
    say: Callable[[str], None],
    hear: Callable[[Event], None] = lambda event: None,
) -> None:
    """Until an exception ends it (Stopped, F505); `hear` is told how far the work of the moment is.

    Raises T701 to T708 for keys that cannot be used, E802 for a connection that is refused, C101 to C105 for
    a policy that cannot be read.
    """
    home = Path(config.home)
    with alone(home):
        read_policy(config.policy)  # the worker would say so too, after a while
        while True:
            identity = newest(Path(config.keys), home)
            if identity.name.name == COORDINATOR:
                raise FedtuneError(
                    "T705",
                    f"the coordinator's own keys in '{config.keys}'",
                    "the keys of a site",
                    "give the folder that 'fedtune keys issue' made",
                )
            if why := reason(identity, config.coordinator):
                raise why
            own = replace(config, keys=str(identity.folder), first_keys=config.keys)
            served(own, identity, say, hear)


def served(
    config: SiteConfig, identity: Identity, say: Callable[[str], None], hear: Callable[[Event], None]
) -> None:
    """With these keys, until they have been renewed. Raises what `attend` does."""
    home, private = Path(config.home), short_folder()
    fleet_proxy = FleetProxy(identity, config.coordinator, home=home)
    programs: list[Program] = []
    try:
        own = replace(config, socket=str(private / "worker"), trainer_token=secrets.token_hex(32))
        programs = site_programs(own, fleet_proxy.address, private)
        say(
            f"site '{identity.name.name}' of '{identity.name.federation}', coordinator "
            f"{config.coordinator}, home {home}"
        )
        if not proxy_for(config.coordinator) and (nobody := unreachable(config.coordinator)):
            say(f"nobody answers at {config.coordinator} yet ({nobody}); this site goes on trying")
        line, ended = Line(identity, config.coordinator, say), 0
        keys = Renewal(identity, home, say)
        events = home / "worker.jsonl"
        told = Told(events, events.stat().st_size if events.exists() else 0)
        while not keys.look(fleet_proxy):
            for program in programs:
                program.look()
            if stuck(fleet_proxy.asked, programs[1].started, own.socket):
                silent = time.monotonic() - max(fleet_proxy.asked, programs[1].started)
                say(f"Flower's SuperNode has asked for nothing in {silent:.0f} s, while this site had "
                    "nothing to do: "
                    "it is started again")  # fmt: skip
                programs[1].restart()
            if still := overdue(private):
                say(f"this site's worker is ended and started again: {still}")
                programs[0].restart()
            line.look(fleet_proxy)
            for record in told.records():
                if "text" in record:
                    say(str(record["text"]))
                elif event := event_of(record):
                    hear(event)
            for text in fleet_proxy.ended[ended:]:
                say(text)
            ended = len(fleet_proxy.ended)
            if rest() > STOPPED and fleet_proxy.asked > programs[1].started:
                fleet_proxy.asked = (
                    time.monotonic()
                )  # this machine slept, or this program was stopped: the SuperNode could not ask either
    finally:
        stop_all(programs)
        fleet_proxy.close()
        shutil.rmtree(private, ignore_errors=True)


@dataclass
class Renewal:
    """New keys in time: asked for in the last third of the present ones' life, and taken when they come."""

    identity: Identity
    home: Path
    say: Callable[[str], None]
    looked: float = -HOUR
    warned: float = -24 * HOUR

    def look(self, fleet_proxy: FleetProxy) -> bool:
        """Whether there are new keys to go on with. Raises R404."""
        if time.monotonic() > self.looked + HOUR:
            self.looked = time.monotonic()
            fleet_proxy.request = renewal.asked(self.identity, self.home)
            if fleet_proxy.request and time.monotonic() > self.warned + 24 * HOUR:
                self.warned = time.monotonic()
                days = (self.identity.peer.ends - utc_now()).days
                self.say(
                    f"this site's keys end in {days} days; new ones were made, and wait for the authority"
                )
        if not fleet_proxy.renewed:
            return False
        answer, fleet_proxy.renewed = fleet_proxy.renewed, b""
        try:
            ends = renewal.accept(answer, self.identity, self.home).peer.ends
        except FedtuneError as error:
            self.say(f"the coordinator handed on keys that are none: {error}")
            return False
        self.say(f"this site's keys are renewed, until {ends:%Y-%m-%d}; it goes on with them")
        return True


def short_folder() -> Path:
    """A private folder (0700) for sockets, whose paths may have 107 bytes: where TMPDIR is long, in /tmp."""
    folder = Path(tempfile.mkdtemp(prefix="fedtune-"))
    if len(os.fsencode(folder)) < 90:
        return folder
    folder.rmdir()
    return Path(tempfile.mkdtemp(prefix="fedtune-", dir="/tmp"))


@dataclass
class Line:
    """What there is to say of the connection to the coordinator, once each time it changes."""

    identity: Identity
    coordinator: str
    say: Callable[[str], None]
    now: str = ""
    judged: float = -REASONS
    why: str = ""

    def look(self, fleet_proxy: FleetProxy) -> None:
        """Raises T704, T705, E802 where the two ends refuse one another and never were connected; a later
        refusal is said, and may pass."""
        if not fleet_proxy.called:
            return
        if (now := standing(fleet_proxy.last)) != self.now:
            self.now = now
            self.say(
                f"the coordinator is {now}"
                + (f": {fleet_proxy.last[:300]}" if fleet_proxy.last else "")
                + (proxy_hint(self.coordinator) if now == "away" else "")
            )
        if now == "away" and time.monotonic() > self.judged + REASONS:
            self.judged, why = time.monotonic(), reason(self.identity, self.coordinator)
            if why and not fleet_proxy.answered:
                raise why
            if why and str(why) != self.why:
                self.why = str(why)
                self.say(self.why)


def standing(last: str) -> str:
    """How the coordinator stands to this site, by what came of the last call: gRPC's words change while it is
    away, a refusal bears a code."""
    code = last.partition(":")[0]
    return (
        f"there, and refuses this site ({code})"
        if code in CATALOGUE
        else "away"
        if last
        else "there, and this site is connected"
    )


def rest() -> float:
    """Sleep for a moment; how long it was in the end."""
    began = time.monotonic()
    time.sleep(LOOK)
    return time.monotonic() - began


def stuck(asked: float, started: float, worker: str) -> bool:
    """Whether the SuperNode waits for a ClientApp that is not there.

    It takes one message at a time, and where a message's run ended while it was being answered, or its
    SuperExec died just then, it waits for
    that answer for ever, its heart beating (flwr 1.41, _push_messages). One that has not asked anything in
    this life may still be starting.
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
        """Texts since the last time."""
        return [str(record["text"]) for record in self.records() if "text" in record]

    def records(self) -> list[dict[str, Any]]:
        """What it wrote since the last time; a line that is not whole yet is left for the next."""
        found: list[dict[str, Any]] = []
        if not self.path.exists():
            return found
        if self.path.stat().st_size < self.read:  # begun anew
            self.read = 0
        with self.path.open("rb") as file:
            file.seek(self.read)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self.read += len(line)
                with contextlib.suppress(ValueError):
                    found += [record] if isinstance(record := json.loads(line), dict) else []
        return found


def site_programs(config: SiteConfig, superlink: str, private: Path) -> list[Program]:
    """The worker, Flower's SuperNode, the SuperExec that starts a ClientApp for each message, and the site's
    own training script where it has one."""
    home = Path(config.home)
    flower = home / "flower"
    flower.mkdir(parents=True, exist_ok=True)
    env = environment(flower)
    theirs = bare(env, flower)
    told = private / "worker.json"
    config.write(told)
    port = free_port()
    node = f'worker="{config.socket}"'
    prefork = (sys.executable, "-m", "fedtune.flower.prefork", str(flower / "bin" / PREFORK))
    superexec = prefork if sys.platform == "linux" else (SUPEREXEC,)
    commands = {
        "worker": (sys.executable, "-m", "fedtune.deploy.worker", str(told)),
        "supernode": (
            "flower-supernode",
            "--insecure",
            "--superlink",
            superlink,
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
            "--isolation",
            "process",
            "--node-config",
            node,
        ),
        "superexec": (*superexec, "--insecure", "--runtime-api-address", f"127.0.0.1:{port}"),
    }
    theirs_not = [config.keys, config.data, config.shared, config.home, config.policy, config.trainer]
    kept = json.dumps(walls(flower, theirs_not))
    logs = {name: home / "logs" / f"{name}.log" for name in commands}
    flowers = [
        Program(name, commands[name], logs[name], theirs, walls=kept) for name in ("supernode", "superexec")
    ]
    programs = [Program("worker", commands["worker"], logs["worker"], env, own=True), *flowers]
    return [*programs, script_program(config)] if config.trainer else programs

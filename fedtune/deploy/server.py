"""fedtune server: the coordinator's programs, started and looked after, until every run has ended.

    runs/.coordinator/   the coordinator's home, one a folder of runs
      exchange/          states and updates (fedtune.exchange)
      flower/            Flower's home and its state.db
      app/  logs/  gateway.json  gateway.jsonl
    runs/NAME/           a run's folder, as everywhere; deploy.json says where its coordinator is

Whatever dies is started again: the SuperLink keeps its messages in SQLite, the exchange and the journal are
on disk, and a run whose
ServerApp has died is submitted once more and goes on after its last committed round, with the updates that
were accepted meanwhile.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedtune.config import Recipe, method_of, with_rates
from fedtune.deploy.app import write_app
from fedtune.deploy.coordinator_run import CRASH, Deployed, failed
from fedtune.deploy.gateway import GatewayConfig
from fedtune.deploy.preflight import require_ready
from fedtune.deploy.resources import require_room
from fedtune.deploy.sites import resolved
from fedtune.deploy.supervisor import TRIES, Program, alone, environment, free_port, healthy, stop_all
from fedtune.disk import disk_errors, took
from fedtune.errors import FedtuneError
from fedtune.runtime.folder import RunFolder, recipe_of
from fedtune.trust import AllowList, load
from fedtune.trust.identity import ALLOWED, CERTIFICATE

HOME = ".coordinator"
START_SECONDS = 300.0
ABSENT = 10.0  # seconds without a process that holds the run's folder, after which it is submitted again
SUBMITTED = 90.0  # seconds that a submission may take to get hold of it
LOOK = 0.5
FAREWELL = (
    4.0  # seconds from a run's end to the gateway's: SuperNodes ask every 3 s, and so their sites hear of it
)
STEPS = ("ClientDone", "RoundDone")


@dataclass
class Running:
    """One run, seen from outside: its folder is the truth."""

    folder: RunFolder
    submitted: float = 0.0
    held: float = 0.0
    submissions: int = 0  # since its last step forward
    refused: int = 0  # submissions in a row that Flower did not take
    read: int = 0  # bytes of events.jsonl that were told

    @property
    def result(self) -> bool:
        return (self.folder.path / "result.json").exists()

    @property
    def is_held(self) -> bool:
        """Whether a process works on it now."""
        try:
            with (self.folder.path / "lock").open("a") as handle:
                return not took(handle)
        except OSError:
            return True

    def events(self) -> Iterator[dict[str, Any]]:
        """What it has told since the last time."""
        path = self.folder.path / "events.jsonl"
        if not path.exists():
            return
        with path.open("rb") as file:
            file.seek(self.read)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self.read += len(line)
                with contextlib.suppress(ValueError):
                    yield json.loads(line)


@dataclass
class Coordinator:
    """The programs of one coordinator."""

    keys: Path
    runs: Path
    listen: str
    metrics: str
    show: Callable[[dict[str, Any]], None]
    programs: list[Program] = field(default_factory=list)
    connections: int = 256
    superlink: str = ""
    certificate: int = 0  # when it was last changed
    env: dict[str, str] = field(default_factory=dict)

    @property
    def home(self) -> Path:
        return self.runs / HOME

    def start(self, body: str) -> None:
        """SuperLink, SuperExec and gateway. Raises F505, and what the gateway ends with at once: E801,
        T701 to T708, M301, S701 to S704."""
        self.env = environment(self.home / "flower")
        self.superlink = f"127.0.0.1:{free_port()}"
        flower = self.home / "flower"
        flower.mkdir(parents=True, exist_ok=True)
        (flower / "config.toml").write_text(
            f'[superlink]\ndefault = "here"\n[superlink.here]\naddress = "{self.superlink}"\ninsecure = '
            "true\n"
        )
        write_app(self.home / "app")
        config = self.home / "gateway.json"
        GatewayConfig(
            str(self.keys),
            str(self.home),
            self.listen,
            self.superlink,
            self.metrics,
            body,
            self.connections,
        ).write(config)
        port = self.superlink.rpartition(":")[2]
        self.add(
            "superlink",
            "flower-superlink",
            "--insecure",
            "--host",
            "127.0.0.1",
            "--port",
            port,
            "--isolation",
            "process",
            "--database",
            str(flower / "state.db"),
            "--disable-runtime-dependency-installation",
        )
        self.add("superexec", "flower-superexec", "--insecure", "--runtime-api-address", self.superlink)
        self.add("gateway", sys.executable, "-m", "fedtune.deploy.gateway", str(config), own=True)
        self.wait_for(
            lambda: healthy(f"http://{self.superlink}/health") and self._open(),
            "Flower's SuperLink and the gateway",
        )

    def _open(self) -> bool:
        """Whether the gateway takes connections."""
        host, _, port = self.listen.rpartition(":")
        try:
            with socket.create_connection(
                ("127.0.0.1" if host in ("0.0.0.0", "[::]", "") else host.strip("[]"), int(port)), 1
            ):
                return True
        except OSError:
            return False

    def add(self, name: str, *command: str, own: bool = False) -> None:
        self.programs.append(Program(name, command, self.home / "logs" / f"{name}.log", self.env, own))

    def look(self) -> None:
        """Start again what has died, and the gateway where the coordinator's keys were renewed: sites come
        back to it, and an upload goes on where it was."""
        for program in self.programs:
            program.look()
        with contextlib.suppress(OSError):
            found = (self.keys / CERTIFICATE).stat().st_mtime_ns
            if self.certificate and found != self.certificate:
                for program in self.programs:
                    if program.name == "gateway":
                        program.restart()
            self.certificate = found

    def wait_for(self, done: Callable[[], bool], what: str) -> None:
        """Raises F505."""
        end = time.monotonic() + START_SECONDS
        while not done():
            self.look()
            if time.monotonic() > end:
                raise FedtuneError(
                    "F505",
                    sentence=f"{what} was not ready after {START_SECONDS:.0f} s",
                    do=f"look at {self.home / 'logs'}",
                )
            time.sleep(0.2)

    def submit(self, run: Running) -> None:
        """Ask Flower to run the ServerApp; it takes the folder's lock, so that there is never more than one
        at work. Raises F505, R404."""
        require_room(run.folder.path)
        if run.submissions >= TRIES:
            sentence = f"the process of the run ended {run.submissions} times without one more answer"
            raise FedtuneError(
                "F505",
                sentence=sentence,
                do=f"look at {run.folder.path / CRASH}, then: fedtune resume {run.folder.path}",
            )
        run.submitted, run.submissions = time.monotonic(), run.submissions + 1
        command = [
            "flwr",
            "run",
            str(self.home / "app"),
            "here",
            "--format",
            "json",
            "--run-config",
            f'folder="{run.folder.path}"',
        ]
        try:
            done = subprocess.run(
                command, env=self.env, capture_output=True, text=True, check=False, timeout=START_SECONDS
            )
            said = done.stdout + done.stderr
        except subprocess.TimeoutExpired:  # a SuperLink that stands still
            said = f"no answer within {START_SECONDS:.0f} s"
        if '"success": true' not in said:  # it ends with 0 either way
            words = " ".join(said.split())[-300:]
            run.refused, run.submissions = run.refused + 1, run.submissions - 1
            if run.refused > TRIES:
                raise FedtuneError(
                    "F505",
                    sentence=f"Flower did not accept the run ({words})",
                    do=f"look at {self.home / 'logs'}",
                )
            run.submitted = time.monotonic() - SUBMITTED + 5

    def look_at(self, run: Running) -> bool:
        """Tell what is new; submit the run where nobody works on it. True: it has ended. Raises what it ended
        with."""
        for event in run.events():
            run.submissions = 0 if event.get("event") in STEPS else run.submissions
            self.show(event)
        now, held = time.monotonic(), run.is_held
        if held:
            run.held, run.refused = now, 0
            return False
        if run.result:
            for event in run.events():
                self.show(event)
            return True
        if why := failed(run.folder):
            raise Ended(str(why["sentence"]), int(why["exit_code"]))
        waited = now - max(run.held, run.submitted)
        if not run.submitted or waited > (ABSENT if run.held > run.submitted else SUBMITTED):
            self.submit(run)
        return False

    def stop(self) -> None:
        stop_all(self.programs)


class Ended(Exception):
    """A run ended by itself with a sentence and an exit code."""

    def __init__(self, sentence: str, exit_code: int) -> None:
        super().__init__(sentence)
        self.exit_code = exit_code


def require_coordinator(keys: Path) -> None:
    """Raises T701 to T706 for keys with which no coordinator can be started."""
    identity = load(keys)
    if not identity.is_coordinator:
        raise FedtuneError(
            "T705",
            f"the keys of '{identity.name.name}' in '{keys}'",
            "the coordinator's",
            "give the folder that 'fedtune keys init' made",
        )
    AllowList(identity.folder / ALLOWED).check(identity.peer)


def require_new_ready(recipe: Recipe, stem: str, runs: Path, keys: Path) -> None:
    """Raises what would end a run at its beginning, where it has none yet: its folder could not be had by the
    recipe with the mistake mended."""
    if not (runs / (recipe.name or stem) / "config.json").exists():
        require_ready(resolved(recipe, keys))


def begin(
    recipe: Recipe,
    stem: str,
    runs: Path,
    keys: Path,
    listen: str,
    metrics: str = "",
    connections: int = 256,
) -> RunFolder:
    """The run's folder: a new one, or the one that this recipe began. Raises R401, R406, and what `resolved`
    raises."""
    name = recipe.name or stem
    folder = RunFolder(runs / name)
    if (folder.path / "config.json").exists():
        known = {recipe_of(folder).fingerprint, Deployed.read(folder).recipe}
        if recipe.fingerprint not in known:
            found = (
                f"a run '{folder.path}' that was started with another recipe ({max(known)[:12]}, now "
                f"{recipe.fingerprint[:12]})"
            )
            raise FedtuneError(
                "R406",
                found,
                "the same recipe",
                "restore the recipe to continue this run, or start another: --set name=NAME",
            )
    else:
        named = resolved(recipe, keys)
        with disk_errors(folder.path):
            (folder.path / "state").mkdir(parents=True, exist_ok=True)
        Deployed(
            str(keys),
            str(runs / HOME),
            f"{name.lstrip('.')[:40] or 'run'}-{secrets.token_hex(8)}",
            listen,
            recipe.fingerprint,
            metrics,
            connections,
        ).write(folder)
        folder.begin(with_rates(named))  # last: from here on it is a run
    (folder.path / "failed.json").unlink(missing_ok=True)
    return folder


def split_run(folders: Sequence[RunFolder]) -> str:
    """The folder of a run whose model is split, "" where there is none; the gateway serves one body. Raises
    C104 where runs need different ones."""
    bodies: dict[str, str] = {}
    for folder in folders:
        recipe = recipe_of(folder)
        if split := method_of(recipe).capabilities.split:
            bodies.setdefault(
                json.dumps([recipe.model.model_dump(mode="json"), dict(split.place)]), str(folder.path)
            )
    if len(bodies) > 1:
        found = f"{len(bodies)} split runs with different bodies at one coordinator"
        raise FedtuneError(
            "C104",
            found,
            "one model and one cut",
            "give each its own coordinator: another --runs and --listen",
        )
    return next(iter(bodies.values()), "")


def opened(folder: RunFolder) -> Running:
    """A run from here on: what it told before is not told again."""
    path = folder.path / "events.jsonl"
    return Running(folder, read=path.stat().st_size if path.exists() else 0)


def welcome(folder: RunFolder, listen: str) -> str:
    """Where the coordinator listens, and whom it waits for."""
    sites = recipe_of(folder).deploy.sites
    return (
        f"{folder.path.name}: listening on {listen} for {len(sites)} clients: "
        f"{', '.join(sites[:12])}{' ...' if len(sites) > 12 else ''}"
    )


def conduct_all(folders: Sequence[RunFolder], coordinator: Coordinator) -> int:
    """Start the programs, submit the runs, look after both until all runs have ended; the exit code."""
    with alone(coordinator.home):
        open_runs, code = [opened(folder) for folder in folders], 0
        for run in [run for run in open_runs if run.result]:
            coordinator.show({"event": "RunDone", "result": run.folder.read_json("result.json")})
            open_runs.remove(run)
        if not open_runs:
            return code
        try:
            coordinator.start(split_run([run.folder for run in open_runs]))
            for run in open_runs:
                coordinator.show({"event": "Noted", "text": welcome(run.folder, coordinator.listen)})
            while open_runs:
                coordinator.look()
                for run in list(open_runs):
                    try:
                        ended = coordinator.look_at(run)
                    except (Ended, FedtuneError) as error:  # one run's end is not the others'
                        coordinator.show({"event": "Ended", "text": str(error)})
                        ended, code = True, max(code, error.exit_code)
                    if ended:
                        open_runs.remove(run)
                time.sleep(LOOK)
            time.sleep(FAREWELL)
            return code
        finally:
            coordinator.stop()

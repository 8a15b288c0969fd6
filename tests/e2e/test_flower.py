"""The same recipe on Flower: its simulation engine, a real SuperLink with two real SuperNodes, and nodes that
fail."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from fedtune.config import Recipe
from fedtune.errors import FedtuneError
from fedtune.runtime.folder import RunFolder
from tests import small
from tests.waiting import LONG, PATIENCE, free_ports, wait_for

client_app, server_app = (
    pytest.importorskip("fedtune.flower.client_app"),
    pytest.importorskip("fedtune.flower.server_app"),
)
messages, simulation = (
    pytest.importorskip("fedtune.flower.messages"),
    pytest.importorskip("fedtune.flower.simulation"),
)

ROOT = Path(__file__).parents[2]
COPIED = (
    "pyproject.toml",
    "LICENSE",
    "server",
    "client",
    "simulations",
)  # of a checkout, what Flower's command line reads
MEMORY = {
    "chain": [{"step": "sign", "error_feedback": True}]
}  # what a client did not get to say, it keeps until the next round


def journal(folder: RunFolder) -> list[Any]:
    """All that a journal says, but for the seconds, and the clients' states, which a node far away keeps to
    itself."""
    with closing(sqlite3.connect(folder.journal)) as db:
        rounds = db.execute(
            "SELECT number, state_sha256, file_sha256, link, metrics FROM rounds ORDER BY number"
        ).fetchall()
        return (
            rounds
            + db.execute(
                "SELECT round, client, outcome, weight, up_bytes, down_bytes, note FROM answers ORDER BY "
                "round, client"
            ).fetchall()
        )


# --- Flower's simulation engine ---


@pytest.mark.thorough
def test_the_simulation_engine_ends_with_the_bytes_of_a_local_run_even_if_an_actor_is_killed(
    tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    """From the command line, with clients that remember; one Ray actor gets SIGKILL after the first round. The
    program stands still while the actor is looked for: a round takes no longer than that."""
    changes: dict[str, Any] = {**MEMORY, "rounds": 6}
    recipe = small.write_recipe(tmp_path / "small.toml", tiny_bert, data, **changes)
    command = [
        sys.executable,
        "-m",
        "fedtune",
        "simulate",
        str(recipe),
        "--engine",
        "flower",
        "--runs",
        str(tmp_path / "runs"),
    ]
    errors = (tmp_path / "stderr").open("w+")
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
        env=os.environ | {"RAY_AUTH_TOKEN": f"test-{tmp_path}"},
    )
    marked = f"RAY_AUTH_TOKEN=test-{tmp_path}"
    try:
        lines = []
        for line in process.stdout or []:
            lines.append(line)
            if line.startswith("round   1"):
                process.send_signal(signal.SIGSTOP)
                actors = [pid for pid in processes(marked) if b"ray::ClientAppActor" in command_of(pid)]
                os.kill(actors[0], signal.SIGKILL)
                process.send_signal(signal.SIGCONT)
        assert process.wait(PATIENCE) == 0
    finally:
        process.kill()
        end = time.monotonic() + PATIENCE
        while (
            leftover := processes(marked)
        ) and time.monotonic() < end:  # Ray's helpers notice a moment later that they are alone
            time.sleep(0.1)
        for pid in leftover:
            print(command_of(pid))
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        errors.seek(0)
        print("".join(lines), errors.read())
    assert not leftover
    local, result, _ = small.play(small.recipe(tiny_bert, data, **changes), tmp_path / "local")
    folder = RunFolder(tmp_path / "runs" / "small")
    assert folder.read_json("result.json")["state_sha256"] == result["state_sha256"]
    assert journal(folder) == journal(local)
    assert (
        client_states(folder) == client_states(local) != {}
    )  # so `fedtune resume` would go on with the same bytes
    said = [line.split()[0] for line in lines if line.strip() and not line.startswith("... ")]
    assert said[:4] == [
        f"{folder.path}:",
        "round",
        "round",
        "round",
    ]  # no chatter before or between, but what is waited for
    chatter = [
        line
        for line in (tmp_path / "stderr").read_text().splitlines()
        if "Failed to push error to driver" not in line
    ]
    assert not chatter  # Ray's C++ may say that one line of the actor that was killed


def client_states(folder: RunFolder) -> dict[str, bytes]:
    """What clients remember after the last round, by file."""
    return {
        str(path.relative_to(folder.path)): path.read_bytes()
        for path in sorted((folder.path / "memory").rglob("*.safetensors"))
    }


def processes(mark: str) -> list[int]:
    """Living processes that have `mark` in their environment, other than this one."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            alive = path.joinpath("stat").read_text().rpartition(")")[2].split()[0] != "Z"
            if (
                alive
                and int(path.name) != os.getpid()
                and mark.encode() in path.joinpath("environ").read_bytes().split(b"\0")
            ):
                found.append(int(path.name))
        except OSError:  # it has just ended, or is not ours
            continue
    return found


def command_of(pid: int) -> bytes:
    """The command line of a process, empty for one that has ended."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


@pytest.mark.thorough
def test_an_engine_that_cannot_start_says_so_at_once() -> None:
    with (
        pytest.raises(FedtuneError, match=r"F504: Flower's simulation engine stopped \(ActorPool is empty"),
        simulation.engine(1, {"num_cpus": 1, "num_gpus": 99}) as grid,
    ):
        server_app.find_nodes(grid, 1, 60)


# --- a SuperLink and two SuperNodes ---


class Deployment:
    """Flower's own processes on loopback, each with a log; `close` leaves none of them alive."""

    def __init__(self, root: Path) -> None:
        self.root, self.home = root, root / "home"
        self.home.mkdir()
        self.link, *self.nodes = free_ports(3)
        (self.home / "config.toml").write_text(
            f'[superlink]\ndefault = "loop"\n[superlink.loop]\naddress = "127.0.0.1:{self.link}"\ninsecure = '
            "true\n"
        )
        self.env = os.environ | {
            "FLWR_HOME": str(self.home),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.25",
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        }
        self.running: list[subprocess.Popen[bytes]] = []

    def open(self) -> None:
        address = f"127.0.0.1:{self.link}"
        self.start(
            "flower-superlink",
            "--insecure",
            "--host",
            "127.0.0.1",
            "--port",
            str(self.link),
            "--disable-runtime-dependency-installation",
        )
        wait_for(lambda: healthy(f"http://{address}/health"), "the SuperLink")
        for partition, port in enumerate(self.nodes):
            config = f"partition-id={partition} num-partitions={len(self.nodes)}"
            self.start(
                "flower-supernode",
                "--insecure",
                "--superlink",
                address,
                "--host",
                "127.0.0.1",
                "--port",
                str(port),
                "--node-config",
                config,
            )

    def start(self, *command: str) -> None:
        log = (self.root / f"{len(self.running)}-{command[0]}.log").open("wb")
        self.running.append(
            subprocess.Popen(
                command,
                cwd=self.root,
                env=self.env,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        )

    def flwr(self, *arguments: str) -> Any:
        done = subprocess.run(
            ["flwr", *arguments, "--format", "json"],
            cwd=self.root,
            env=self.env,
            capture_output=True,
            text=True,
            check=False,
            timeout=PATIENCE,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(done.stdout)

    def run(self, **config: str) -> str:
        """`flwr run` from the repository's root; the run's id."""
        values = " ".join(f'{key}="{value}"' for key, value in config.items())
        return str(self.flwr("run", str(ROOT), "loop", "--run-config", values)["run-id"])

    def state(self, run: str) -> dict[str, Any]:
        """What `flwr list` says about a run."""
        found: dict[str, Any] = self.flwr("list", "loop", "--run-id", run)["runs"][0]
        return found

    def close(self) -> None:
        for process in self.running:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(PATIENCE)
        for pid in processes(f"FLWR_HOME={self.home}"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def logs(self) -> str:
        return "\n".join(
            f"--- {path.name}\n{path.read_text(errors='replace')[-6000:]}"
            for path in sorted(self.root.glob("*.log"))
        )


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    made = Deployment(tmp_path_factory.mktemp("flower"))
    try:
        made.open()
        yield made
    finally:
        made.close()
        print(made.logs())  # pytest shows it where a test failed


def healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


@pytest.mark.slow
def test_a_superlink_and_two_supernodes_end_with_the_bytes_of_a_local_run(
    deployment: Deployment, tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    changes = {"partition__clients": 2, **MEMORY}
    recipe = small.write_recipe(tmp_path / "small.toml", tiny_bert, data, **changes)
    run = deployment.run(recipe=str(recipe), set="rounds=2", runs=str(tmp_path / "runs"))
    folder = RunFolder(tmp_path / "runs" / "small")
    with showing(deployment):
        wait_for((folder.path / "result.json").exists, "the run's result", LONG)
        local, result, _ = small.play(small.recipe(tiny_bert, data, rounds=2, **changes), tmp_path / "local")
        assert folder.read_json("result.json")["state_sha256"] == result["state_sha256"]
        assert journal(folder) == journal(local)
        wait_for(lambda: deployment.state(run)["status"] == "finished:completed", "the end of the run", LONG)


@pytest.mark.slow
def test_a_mistake_in_the_recipe_ends_the_flower_run_with_its_sentence(
    deployment: Deployment, tmp_path: Path
) -> None:
    run = deployment.run(set="rounds=0", runs=str(tmp_path / "runs"))
    with showing(deployment):
        wait_for(lambda: deployment.state(run)["status"].startswith("finished"), "the end of the run", LONG)
        state = deployment.state(run)
        assert state["status"] == "finished:failed" and "C102: found rounds = 0" in json.dumps(state)
        assert not (tmp_path / "runs").exists()


@contextmanager
def showing(deployment: Deployment) -> Iterator[None]:
    """Print the processes' logs where the block fails."""
    try:
        yield
    except BaseException:
        print(deployment.logs())
        raise


# --- nodes that fail ---


@pytest.mark.slow
def test_flwr_run_as_the_readme_prints_it(tiny_bert: Path, data: Path, tmp_path: Path) -> None:
    """The README's own line, from a checkout with a recipe of as many clients, on Flower's default local
    SuperLink; no network is asked."""
    (line,) = [
        text.partition("    #")[0].strip()
        for text in (ROOT / "README.md").read_text().splitlines()
        if "flwr run ." in text
    ]
    assert "num-supernodes=8 " in line and Recipe().partition.clients == 8
    shutil.copytree(
        ROOT,
        tmp_path / "checkout",
        ignore=lambda folder, names: set(names) - set(COPIED) if folder == str(ROOT) else (),
    )
    small.write_recipe(tmp_path / "checkout" / "my.toml", tiny_bert, data, partition__clients=8)
    env = os.environ | {
        "FLWR_HOME": str(tmp_path / "flower"),
        "HF_HUB_OFFLINE": "1",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    env["FLWR_LOCAL_SUPERLINK_HTTP_API_PORT"] = str(
        free_ports(1)[0]
    )  # another's SuperLink may have the usual one
    try:
        done = subprocess.run(
            line,
            shell=True,
            cwd=tmp_path / "checkout",
            env=env,
            capture_output=True,
            text=True,
            check=False,
            timeout=LONG,
        )
        assert (tmp_path / "checkout" / "runs" / "my" / "result.json").exists(), done.stdout + done.stderr
        assert "federated: accuracy" in done.stdout
    finally:
        for pid in processes(f"FLWR_HOME={tmp_path / 'flower'}"):
            os.kill(pid, signal.SIGTERM)

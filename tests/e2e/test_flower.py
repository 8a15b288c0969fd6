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
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from fedtune.config import Recipe, method_of
from fedtune.errors import FedtuneError
from fedtune.events import ClientLeftOut
from fedtune.runtime.cohort import RoundCohort
from fedtune.runtime.folder import RunFolder, create
from fedtune.runtime.local import local_transport
from fedtune.runtime.workspace import link_of, workspace_of
from fedtune.schema import digest
from fedtune.types import Round
from tests import small
from tests.runtime.test_groups import grouped
from tests.waiting import LONG, PATIENCE, free_ports, wait_for

client_app, server_app = (
    pytest.importorskip("fedtune.flower.client_app"),
    pytest.importorskip("fedtune.flower.server_app"),
)
messages, simulation = (
    pytest.importorskip("fedtune.flower.messages"),
    pytest.importorskip("fedtune.flower.simulation"),
)
from flwr.app import Context, Error, Message, RecordDict  # noqa: E402
from flwr.supercore.task_identity import TaskIdentity  # noqa: E402

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


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.write_rows(tmp_path_factory.mktemp("rows"))


def write_recipe(path: Path, model: Path, data: Path, **changes: Any) -> Path:
    """A recipe as TOML: JSON values are TOML values, except for tables, which get a header of their own."""
    tree = small.tree(model, data, **changes)
    lines = [f"{key} = {inline(value)}" for key, value in tree.items() if not isinstance(value, dict)]
    for table, values in tree.items():
        if isinstance(values, dict):
            lines += [f"[{table}]", *(f"{key} = {inline(value)}" for key, value in values.items())]
    path.write_text("\n".join(lines) + "\n")
    return path


def inline(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {inline(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(inline, value)) + "]"
    return json.dumps(value)


def journal(folder: RunFolder) -> list[Any]:
    """All that a journal says, but for the seconds, and the memories, which a node far away keeps to
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


# --- Flower's simulation engine
# ---------------------------------------------------------------------------------


def test_the_simulation_engine_ends_with_the_bytes_of_a_local_run_even_if_an_actor_is_killed(
    tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    """From the command line, with clients that remember; one Ray actor gets SIGKILL after the first round."""
    recipe = write_recipe(tmp_path / "small.toml", tiny_bert, data, **MEMORY)
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
                actors = [pid for pid in processes(marked) if b"ray::ClientAppActor" in command_of(pid)]
                os.kill(actors[0], signal.SIGKILL)
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
    local, result, _ = small.play(small.recipe(tiny_bert, data, **MEMORY), tmp_path / "local")
    folder = RunFolder(tmp_path / "runs" / "small")
    assert folder.read_json("result.json")["state_sha256"] == result["state_sha256"]
    assert journal(folder) == journal(local)
    assert memories(folder) == memories(local) != {}  # so `fedtune resume` would go on with the same bytes
    assert [line.split()[0] for line in lines if line.strip()][:4] == [
        f"{folder.path}:",
        "round",
        "round",
        "round",
    ]  # no chatter before or between
    chatter = [
        line
        for line in (tmp_path / "stderr").read_text().splitlines()
        if "Failed to push error to driver" not in line
    ]
    assert not chatter  # Ray's C++ may say that one line of the actor that was killed


def memories(folder: RunFolder) -> dict[str, bytes]:
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


def test_an_engine_that_cannot_start_says_so_at_once() -> None:
    with (
        pytest.raises(FedtuneError, match=r"F504: Flower's simulation engine stopped \(ActorPool is empty"),
        simulation.engine(1, {"num_cpus": 1, "num_gpus": 99}) as grid,
    ):
        server_app.find_nodes(grid, 1, 60)


# --- a SuperLink and two SuperNodes
# -----------------------------------------------------------------------------


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


def test_a_superlink_and_two_supernodes_end_with_the_bytes_of_a_local_run(
    deployment: Deployment, tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    changes = {"partition__clients": 2, **MEMORY}
    recipe = write_recipe(tmp_path / "small.toml", tiny_bert, data, **changes)
    run = deployment.run(recipe=str(recipe), set="rounds=2", runs=str(tmp_path / "runs"))
    folder = RunFolder(tmp_path / "runs" / "small")
    with showing(deployment):
        wait_for((folder.path / "result.json").exists, "the run's result", LONG)
        local, result, _ = small.play(small.recipe(tiny_bert, data, rounds=2, **changes), tmp_path / "local")
        assert folder.read_json("result.json")["state_sha256"] == result["state_sha256"]
        assert journal(folder) == journal(local)
        wait_for(lambda: deployment.state(run)["status"] == "finished:completed", "the end of the run", LONG)


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


# --- nodes that fail
# --------------------------------------------------------------------------------------------


class FakeGrid:
    """Flower's Grid without Flower: nodes are called at once, in this process. `broken` says what a node does
    instead.

    partitions  node id -> its partition-id, or None
    broken      (partition-id, round) -> "error" (the node crashed: Flower's error reply), "silent", "refused"
                (Flower does not take
                the message), or a recipe mistake: "data"
    """

    def __init__(
        self, partitions: dict[int, int | None], broken: dict[tuple[int, int], str] | None = None
    ) -> None:
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = (
            1,
            1,
            1,
        )  # without them Flower makes no message
        self.broken: dict[tuple[int, int], str] = broken or {}
        self.replies: dict[str, Message | None] = {}
        config = {node: {} if part is None else {"partition-id": part} for node, part in partitions.items()}
        self.contexts = {node: Context(1, node, config[node], RecordDict(), {}) for node in partitions}

    def get_node_ids(self) -> list[int]:
        return list(self.contexts)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        return [name for message in messages if (name := self.take(message))]

    def take(self, message: Message) -> str:
        context = self.contexts[message.metadata.dst_node_id]
        name = message.metadata.__dict__["_message_id"] = f"m{len(self.replies)}"
        greeting = message.metadata.message_type == messages.HELLO
        number = 0 if greeting else int(message.content["ask"]["round"])
        match self.broken.get((int(context.node_config.get("partition-id", -1)), number)):
            case None:
                self.replies[name] = (client_app.hello if greeting else client_app.answer)(message, context)
            case "error":
                self.replies[name] = Message(Error(5, "Node Unavailable"), reply_to=message)
            case "silent":
                self.replies[name] = None
            case "refused":
                return ""
            case "data":
                message.content["ask"]["recipe"] = str(message.content["ask"]["recipe"]).replace(
                    "rows.jsonl", "gone.jsonl"
                )
                self.replies[name] = client_app.answer(message, context)
        return name

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        ready = [name for name in message_ids if self.replies.get(name)]
        found, self.replies = (
            [self.replies[name] for name in ready],
            {n: None if n in ready else r for n, r in self.replies.items()},
        )
        return found


@pytest.mark.parametrize(
    ("how", "code", "words"),
    [
        ("error", "F503", "Node Unavailable"),
        ("silent", "F503", "did not answer within 1 s"),
        ("refused", "F503", "could not deliver"),
        ("data", "D201", "gone.jsonl"),
    ],
)
def test_a_node_that_fails_in_a_round_is_left_out_of_it_and_the_run_goes_on(
    how: str, code: str, words: str, tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    recipe = small.recipe(tiny_bert, data, **MEMORY)
    grid = FakeGrid({90 + part: part for part in range(4)}, {(2, 2): how})

    def carry(link: Any, workspace: Any) -> Any:
        return server_app.flower_transport(grid, recipe, server_app.find_nodes(grid, 4, 5), seconds=1)

    folder, result, events = small.play(recipe, tmp_path, carry=carry)
    out = [(e.round, e.client, e.code) for e in events if isinstance(e, ClientLeftOut)]
    assert out == [(2, 2, code)] and words in next(e.text for e in events if isinstance(e, ClientLeftOut))
    assert result["rounds"] == 3 and result["left_out"] == 1
    assert [row[2] for row in journal(folder)[3:]] == ["ok"] * 6 + [code] + [
        "ok"
    ] * 5  # (round, client), ascending


def test_a_run_on_a_grid_without_failures_is_a_local_run(tiny_bert: Path, data: Path, tmp_path: Path) -> None:
    """The fake itself must not be what makes the tests above pass."""
    recipe = small.recipe(tiny_bert, data, **MEMORY)
    folder = create(tmp_path, "", "run")
    server_app.serve(FakeGrid({7: 3, 5: 1, 6: 2, 9: 0}), recipe, folder, lambda event: None)
    assert journal(folder) == journal(small.play(recipe, tmp_path / "local")[0])


def test_sums_by_group_are_the_same_on_a_grid(tiny_bert: Path, data: Path) -> None:
    recipe = small.recipe(tiny_bert, data)
    workspace = workspace_of(recipe)
    link = grouped(link_of(workspace, method_of(recipe)))
    grid = FakeGrid({90 + part: part for part in range(4)})
    transports = {
        "local": local_transport(link, workspace.client, workspace.done),
        "flower": server_app.flower_transport(grid, recipe, server_app.find_nodes(grid, 4, 5), seconds=60),
    }
    given, sums = link.method.start(workspace.tunable).shared, {}
    for name, transport in transports.items():
        cohort = RoundCohort(
            link, Round(1, recipe.seed, (0, 1, 2, 3)), transport, lambda event: None, workspace.names
        )
        sums[name] = cohort.sum_groups("train", given, lambda client: client // 2)
    assert sums["local"].keys() == sums["flower"].keys() == {0, 1}
    for group, total in sums["local"].items():
        assert (
            digest(total.tensors) == digest(sums["flower"][group].tensors)
            and total.metrics == sums["flower"][group].metrics
        )


@pytest.mark.parametrize(
    ("partitions", "broken", "words"),
    [
        ({5: 0}, {}, r"F502: found no node for client 1 after 1 s \(1 nodes answered\)"),
        ({5: 0, 6: 1}, {(1, 0): "error"}, "F502: found no node for client 1"),
        ({5: 0, 6: 1, 7: 2}, {(2, 0): "silent"}, "F502: found a node that gave no answer within 1 s"),
        ({5: 0, 6: 0}, {}, "F503: two nodes both report that they are client 0"),
        ({5: 0, 6: 1, 7: 1}, {}, "F503: two nodes both report that they are client 1"),
        ({5: 0, 6: None}, {}, "F503: a node does not report which client it is"),
    ],
)
def test_nodes_that_are_missing_or_doubled_are_named_before_the_first_round(
    partitions: Any, broken: Any, words: str
) -> None:
    with pytest.raises(FedtuneError, match=words):
        server_app.find_nodes(FakeGrid(partitions, broken), 2, 1)


def test_a_node_that_comes_late_and_one_that_has_gone_do_not_stop_a_run() -> None:
    grid = FakeGrid({5: 0, 6: 1}, {(1, 0): "error"})
    asked = iter([[5], [5, 6], [5, 6, 8]])
    grid.contexts[8] = Context(1, 8, {"partition-id": 1}, RecordDict(), {})

    def nodes() -> list[int]:
        found = next(asked, [5, 6, 8])
        if 8 in found:
            grid.broken.clear()
        return found

    grid.get_node_ids = nodes  # type: ignore[method-assign]
    assert server_app.find_nodes(grid, 2, 5) == {0: 5, 1: 8}


def test_whoever_waits_for_nodes_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_app, "LATE_SECONDS", 0.2)
    said: list[str] = []
    with pytest.raises(FedtuneError, match=r"F502.*num-supernodes"):
        server_app.find_nodes(FakeGrid({5: 0, 6: 1}), 8, 1, said.append)
    assert (
        len(said) == 1
        and said[0].startswith("waiting for nodes: 2 of 8 clients have one")
        and "num-supernodes" in said[0]
    )
    assert server_app.find_nodes(FakeGrid({5: 0, 6: 1}), 2, 1, said.append) == {0: 5, 1: 6} and len(said) == 1


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
    write_recipe(tmp_path / "checkout" / "my.toml", tiny_bert, data, partition__clients=8)
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

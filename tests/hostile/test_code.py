"""A recipe travels, never code: a coordinator that was taken over serves an app of its own through Flower's
real programs, and no line of it runs at a site."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedtune.deploy.app import bundle, own_app, own_run
from fedtune.deploy.server import Coordinator
from fedtune.deploy.supervisor import bare
from fedtune.errors import FedtuneError
from tests.deploy.flowers import RUN
from tests.e2e.deploying import Deployment, deployed
from tests.e2e.faults.crash.roles import processes
from tests.waiting import PATIENCE, wait_for

pytestmark = pytest.mark.timeout(900)
PROJECT = """[project]
name = "evil"
version = "1.0.0"
license = {{ file = "LICENSE" }}
dependencies = ["flwr>=1.41.0"]
[tool.flwr.app]
publisher = "fedtune"
fab-format-version = 1
flwr-version-target = "1.41.0"
fab-include = ["/{package}/*.py", "/LICENSE"]
[tool.flwr.app.components]
serverapp = "{package}.server:app"
clientapp = "{package}.client:app"
[tool.flwr.app.config]
marker = ""
"""
SERVER = """import json, time
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import ServerApp
app = ServerApp()

@app.main()
def main(grid, context):
    while not (nodes := list(grid.get_node_ids())):
        time.sleep(0.2)
    said = []
    asked = {"query.site": {"site": ConfigRecord({"nonce": b"n" * 16})}, "query": {}, "train.ticket": {"ticket": ConfigRecord({"ticket": b"no"})}}
    for kind, content in asked.items():
        said += grid.send_and_receive([Message(RecordDict(content), nodes[0], kind)], timeout=300)
    open(MARKER + ".answers", "w").write(json.dumps([("error " + str(m.error.reason) if m.has_error() else list(m.content)) for m in said]))
"""
CLIENT = """import os
from flwr.clientapp import ClientApp
open(MARKER, "a").write(str(os.environ))
app = ClientApp()

@app.query()
def do(message, context):
    open(MARKER, "a").write("ran")
    return message
"""


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Deployment, Coordinator]]:
    """A real site, and a coordinator's machine in the hands of somebody else: every program and key of it,
    without the run's own process."""
    with deployed(tmp_path_factory.mktemp("taken"), ["site-a"]) as made:
        taken = Coordinator(
            made.authority.place("coordinator"),
            made.root / "runs",
            f"127.0.0.1:{made.port}",
            "",
            lambda event: None,
        )
        taken.home.mkdir(parents=True)
        try:
            taken.start("")
            made.join("site-a", FEDTUNE_PASSPHRASE="open sesame", HOSPITAL_TOKEN="secret")
            yield made, taken
            print(made.logs())
        finally:
            taken.stop()


def serve(taken: Coordinator, folder: Path, package: str) -> Path:
    """Flower's own command starts the app; where its answers will be written."""
    app, marker = folder / package, folder / f"{package}-marker"
    (app / package).mkdir(parents=True)
    files = {
        "server.py": SERVER.replace("MARKER", repr(str(marker))),
        "client.py": CLIENT.replace("MARKER", repr(str(marker))),
        "__init__.py": "",
    }
    for name, text in files.items():
        (app / package / name).write_text(text)
    (app / "LICENSE").write_text("x")
    (app / "pyproject.toml").write_text(PROJECT.format(package=package))
    done = subprocess.run(
        ["flwr", "run", str(app), "here", "--format", "json"],
        env=taken.env,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert '"success": true' in done.stdout, done.stdout + done.stderr
    return marker


@pytest.mark.thorough
@pytest.mark.parametrize("package", ["evil", "fedtune_run"])
def test_a_coordinator_cannot_run_code_at_a_site(
    package: str, federation: tuple[Deployment, Coordinator], tmp_path: Path
) -> None:
    """Under a name of its own, or under that of our app: the site answers, with the code that it has
    installed."""
    _, taken = federation
    marker = serve(taken, tmp_path, package)
    answers = marker.with_name(marker.name + ".answers")
    wait_for(answers.exists, "the site's answers", every=0.2)
    said = json.loads(answers.read_text())
    assert said[0] == ["site"] and said[2] == ["outcome"]  # our own doors
    assert not marker.exists()
    assert len(said) == 3


@pytest.mark.thorough
def test_flowers_programs_at_a_site_see_no_passphrase_and_nothing_of_its_environment(
    federation: tuple[Deployment, Coordinator],
) -> None:
    made, _ = federation
    wait_for(
        lambda: made.pids("supernode", "site-a") and made.pids("superexec", "site-a"), "Flower's programs"
    )
    seen = {
        role: Path(f"/proc/{pid}/environ").read_bytes()
        for pid, role, who in processes(str(made.root))
        if who == "site-a"
    }
    assert b"open sesame" in seen["worker"]
    for role in ("supernode", "superexec"):
        assert (
            b"sesame" not in seen[role]
            and b"HOSPITAL" not in seen[role]
            and b"HOME=" + str(made.root / "home-site-a" / "flower").encode() in seen[role]
        )


def test_what_a_site_tells_its_supernode_of_a_run_is_its_own() -> None:
    """Whatever the coordinator says of app, settings and kind of task."""
    from flwr.common.serde import fab_from_proto, run_from_proto
    from flwr.proto.fab_pb2 import GetFabResponse
    from flwr.proto.run_pb2 import GetRunResponse
    from flwr.proto.run_pb2 import Run as RunProto
    from flwr.proto.transport_pb2 import Scalar

    said = RunProto(
        run_id=RUN,
        fab_id="evil/evil",
        fab_version="9",
        fab_hash="0" * 64,
        primary_task_type="flwr-agentapp",
        series_id=3,
        flwr_aid="who",
    )
    said.override_config["worker"].CopyFrom(Scalar(string="/tmp/elsewhere"))
    run = run_from_proto(GetRunResponse.FromString(own_run(GetRunResponse(run=said).SerializeToString())).run)
    fab = fab_from_proto(GetFabResponse.FromString(own_app()).fab)
    assert (run.run_id, run.series_id, run.fab_id, run.primary_task_type, run.override_config) == (
        RUN,
        3,
        "fedtune/fedtune-run",
        "flwr-serverapp",
        {},
    )
    assert run.fab_hash == fab.hash_str and fab.content == bundle()
    with pytest.raises(FedtuneError, match="W60"):
        own_run(b"\xff" * 20)


def test_the_app_of_a_site_is_what_flower_makes_of_the_same_files() -> None:
    import io
    import zipfile

    from flwr.cli.build import build_fab_from_files

    from fedtune.deploy.app import FILES

    def content(data: bytes) -> dict[str, bytes]:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            return {name: archive.read(name) for name in archive.namelist()}

    assert content(bundle()) == content(
        build_fab_from_files({name: text.encode() for name, text in FILES.items()})[0]
    )


@pytest.mark.thorough
def test_of_an_environment_flowers_programs_get_what_they_need(tmp_path: Path) -> None:
    env = {
        "PATH": "p",
        "LC_ALL": "C",
        "FEDTUNE_PASSPHRASE": "s",
        "AWS_SECRET_ACCESS_KEY": "s",
        "HOME": "/home/u",
        "https_proxy": "u:p@x",
        "FLWR_HOME": "f",
    }
    assert bare(env, tmp_path) == {
        "PATH": "p",
        "LC_ALL": "C",
        "FLWR_HOME": "f",
        "HOME": str(tmp_path),
        "TMPDIR": str(tmp_path / "tmp"),
    }
    assert os.environ

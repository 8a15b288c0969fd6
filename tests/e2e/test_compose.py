"""The docker-compose demos, as a user starts them: each ends with its table and the result of a local run in
the same image.

Slow, and only where a Docker engine is: pytest -m slow tests/e2e/test_compose.py
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PROJECT = "fedtune-test"  # volumes of its own: a user's demo stays as it is
CUT = 60.0  # seconds without a network


def compose(profile: str, *arguments: str, seconds: float = 1200.0) -> subprocess.CompletedProcess[str]:
    command = ["docker", "compose", "--project-name", PROJECT, "--profile", profile, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=seconds)


def why_not() -> str:
    """A reason to skip, or nothing."""
    if not shutil.which("docker"):
        return "no docker here"
    if subprocess.run(["docker", "info"], capture_output=True, check=False).returncode:
        return "no Docker engine answers (docker info)"
    if subprocess.run(["docker", "compose", "version"], capture_output=True, check=False).returncode:
        return "no docker compose here"
    return ""


pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def images() -> None:
    if why := why_not():
        pytest.skip(why)
    built = compose("*", "build", seconds=3600)
    assert not built.returncode, built.stderr[-3000:]


@pytest.fixture
def clean(images: None) -> Iterator[None]:
    compose("*", "down", "--volumes")
    yield
    print(compose("*", "logs", "--no-color", "--tail", "40").stdout)
    compose("*", "down", "--volumes")


def alone(profile: str) -> dict[str, Any]:
    """The result of the same recipe in one process, in the same image, without any network."""
    shell = f"start simulate /opt/fedtune/docker/{profile}.toml > /dev/null && cat runs/{profile}/result.json"
    hardened = [
        "--network",
        "none",
        "--read-only",
        "--tmpfs",
        "/tmp:mode=1777,size=1g",
        "--env",
        "OMP_NUM_THREADS=1",
    ]
    volumes = ["--volume", f"{PROJECT}_model:/model:ro"] if profile == "sfprompt" else []
    run = ["docker", "run", "--rm", *hardened, *volumes, "--entrypoint", "sh", "fedtune-server", "-c", shell]
    return dict(
        json.loads(subprocess.run(run, capture_output=True, text=True, check=True, timeout=1200).stdout)
    )


def state_in(text: str) -> str:
    """What the report printed."""
    found = re.search(r"state_sha256\s+([0-9a-f]{64})", text)
    assert found, text[-3000:]
    return found.group(1)


def wait(done: Callable[[], bool], seconds: float, what: str) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, f"{what} did not happen within {seconds:.0f} s"
        time.sleep(1)


@pytest.mark.parametrize("profile", ["fedpeft", "fedkseed", "sfprompt"])
def test_a_demo_ends_with_the_result_of_a_local_run(clean: None, profile: str) -> None:
    ended = compose(profile, "run", "--rm", "--no-TTY", f"report-{profile}")
    assert not ended.returncode, ended.stderr[-3000:]
    expected = alone(profile)
    assert re.search(rf"^federated( \(round \d, best\))? +{expected['federated']:.4f}$", ended.stdout, re.M)
    assert state_in(ended.stdout) == expected["state_sha256"]


def test_a_site_without_a_network_for_a_minute_changes_nothing(clean: None) -> None:
    started = compose("fedpeft", "up", "--detach")
    assert not started.returncode, started.stderr[-3000:]
    wait(lambda: "round   1" in compose("fedpeft", "logs", "server-fedpeft").stdout, 600, "round 1")
    site = [f"{PROJECT}_federation", f"{PROJECT}-site-b-1"]
    subprocess.run(["docker", "network", "disconnect", *site], check=True)
    time.sleep(CUT)
    assert "round   3" not in compose("fedpeft", "logs", "server-fedpeft").stdout  # it was missed
    subprocess.run(["docker", "network", "connect", *site], check=True)
    ended = compose("fedpeft", "run", "--rm", "--no-TTY", "--no-deps", "report-fedpeft")
    assert "3 of 3 clients" in compose("fedpeft", "logs", "server-fedpeft").stdout
    assert state_in(ended.stdout) == alone("fedpeft")["state_sha256"]


def test_nobody_sees_anothers_keys_or_the_world_outside(clean: None) -> None:
    assert not compose("fedpeft", "up", "--detach").returncode
    wait(
        lambda: "healthy" in compose("fedpeft", "ps", "--format", "{{.Health}}", "site-a").stdout,
        300,
        "a healthy site",
    )
    look = compose(
        "fedpeft",
        "exec",
        "--no-TTY",
        "site-a",
        "sh",
        "-c",
        "id -u; ls /keys /keys/..; touch /opt/x; touch /keys/x; grep CapEff /proc/1/status",
    )
    assert look.stdout.splitlines()[0] == "10001"
    assert "allowed.json" not in look.stdout and "operator" not in look.stdout
    assert look.stderr.count("Read-only file system") == 2
    assert "CapEff:\t0000000000000000" in look.stdout
    code = "import socket; socket.create_connection(('1.1.1.1', 53), 3)"
    assert compose("fedpeft", "exec", "--no-TTY", "site-a", "python", "-c", code).returncode
    keys = [
        compose("fedpeft", "exec", "--no-TTY", f"site-{name}", "sha256sum", "/keys/key.pem").stdout.split()[0]
        for name in "abc"
    ]
    assert len(set(keys)) == 3


def test_only_one_port_is_open(clean: None) -> None:
    """Everything else of the coordinator listens on its own loopback."""
    assert not compose("fedpeft", "up", "--detach").returncode
    wait(
        lambda: "healthy" in compose("fedpeft", "ps", "--format", "{{.Health}}", "server-fedpeft").stdout,
        300,
        "a healthy coordinator",
    )
    tables = compose(
        "fedpeft", "exec", "--no-TTY", "server-fedpeft", "cat", "/proc/net/tcp", "/proc/net/tcp6"
    ).stdout
    listening = [
        line.split()[1] for line in tables.splitlines() if len(line.split()) > 3 and line.split()[3] == "0A"
    ]
    assert listening
    own = (
        "0100007F",
        "0B00007F",
        "00000000000000000000000001000000",
    )  # 127.0.0.1, Docker's resolver at 127.0.0.11, ::1
    open_ports = {int(where.rpartition(":")[2], 16) for where in listening if not where.startswith(own)}
    assert open_ports == {9443}

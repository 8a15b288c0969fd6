"""A site's own script as a program: without the site's secrets, and with an end for all that it starts."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedtune.deploy.script_program import script_environment, script_program
from fedtune.deploy.site_config import SiteConfig
from fedtune.deploy.supervisor import Program
from fedtune.trust.authority import create
from tests.deploy.test_supervisor import alive
from tests.hostile.test_walls import LANDLOCK
from tests.waiting import wait_for

LOOKS = """
import json, os
def tried(what):
    try:
        return "done " + str(what())[:20]
    except OSError as error:
        return type(error).__name__
secret = json.loads(open("secret.json").read())
said = {path: [tried(lambda: open(path).read()), tried(lambda: open(path, "a")), tried(lambda: os.unlink(path))] for path in secret}
said["link"] = tried(lambda: os.link(secret[0], "linked"))
said["own rows"] = tried(lambda: open(os.path.join(os.path.dirname(__file__), "rows.jsonl")).read())
said["own place"] = tried(lambda: open("x", "w").write("x"))
said["move"] = tried(lambda: os.rename("x", "tmp/x"))
said["temporary"] = tried(lambda: __import__("tempfile").TemporaryFile().write(b"x"))
said["worker"] = tried(lambda: open(f"/proc/{os.environ['LC_WHO']}/environ").read())
said["helper"] = __import__("helper").WORD
said["env"], said["cwd"], said["files"] = dict(os.environ), os.getcwd(), sorted(map(int, os.listdir("/proc/self/fd")))[:-1]
said["stdin"] = os.readlink("/proc/self/fd/0")
open("said.part", "w").write(json.dumps(said))
os.rename("said.part", "said.json")
__import__("time").sleep(600)
"""
STARTS = """
import os, subprocess, sys, time
children = [subprocess.Popen(["sleep", "600"], start_new_session=apart) for apart in (False, True)]
open("part", "w").write(" ".join(str(n) for n in [os.getpid(), *(c.pid for c in children)]))
os.rename("part", "pids")
time.sleep(float(sys.argv[1]) if sys.argv[1:] else 600)
"""


@pytest.fixture
def site(tmp_path: Path) -> SiteConfig:
    """As an operator may have it: everything of the site in one folder."""
    made = create(tmp_path / "authority", "hospitals", ["localhost"], 30)
    for name in ("home", "private"):
        (tmp_path / name).mkdir()
    (tmp_path / "home" / "privacy.db").write_text("x")
    (tmp_path / "private" / "worker.json").write_text("x")
    (tmp_path / "policy.toml").write_text("min_rows = 9\n")
    (tmp_path / "rows.jsonl").write_text("{}\n")
    (tmp_path / "helper.py").write_text("WORD = 'helps'\n")
    (tmp_path / "mine.py").write_text(LOOKS)
    keys = made.issue("site-a", 30)
    shutil.copytree(keys, tmp_path / "home" / "keys")
    (tmp_path / "shortcut").symlink_to(keys)
    return SiteConfig(
        str(tmp_path / "home" / "keys"),
        "localhost:1",
        str(tmp_path / "home"),
        str(tmp_path / "private" / "worker"),
        str(tmp_path / "rows.jsonl"),
        policy=str(tmp_path / "policy.toml"),
        first_keys=str(keys),
        trainer=str(tmp_path / "mine.py"),
        trainer_token="t" * 64,
    )


@contextlib.contextmanager
def running(program: Program) -> Iterator[Program]:
    program.look()
    try:
        yield program
    finally:
        program.stop()


def test_a_script_gets_nothing_of_the_sites_secrets(
    site: SiteConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("FEDTUNE_PASSPHRASE", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "https_proxy", "WANDB_API_KEY"):
        monkeypatch.setenv(name, "sesame")
    monkeypatch.setenv("LC_WHO", str(os.getpid()))
    secret = [
        *(str(path) for keys in (site.keys, site.first_keys) for path in sorted(Path(keys).glob("*key*"))),
        site.policy,
        str(tmp_path / "home" / "privacy.db"),
        str(tmp_path / "private" / "worker.json"),
    ]
    assert len(secret) > 6
    with (tmp_path / "open").open("w") as held, running(script_program(site)) as program:
        os.set_inheritable(held.fileno(), True)
        place = tmp_path / "home" / "trainer"
        (place / "secret.json").write_text(json.dumps(secret))
        wait_for((place / "said.json").exists, program.log.read_text())
        said: dict[str, Any] = json.loads((place / "said.json").read_text())
    assert "sesame" not in json.dumps(said["env"]) and "FEDTUNE_PARENT" not in said["env"]
    assert said["env"]["FEDTUNE_TRAINER"] == str(tmp_path / "private" / "trainer")
    assert said["env"]["FEDTUNE_TRAINER_TOKEN"] == "t" * 64
    assert said["cwd"] == str(place) and place.stat().st_mode & 0o777 == 0o700
    assert said["files"] == [0, 1, 2] and said["stdin"] == "/dev/null"
    assert said["helper"] == "helps"
    assert all(said[what].startswith("done") for what in ("own rows", "own place", "move", "temporary"))
    if LANDLOCK:
        assert all(said[path] == ["PermissionError"] * 3 for path in secret), said
        assert said["worker"] == "PermissionError" and said["link"] in ("PermissionError", "OSError")
        assert all(Path(path).exists() for path in secret)


def test_a_variable_that_nobody_knows_does_not_reach_a_script() -> None:
    env = {"PATH": "p", "HF_HOME": "h", "CUDA_VISIBLE_DEVICES": "0", "LC_ALL": "C"}
    more = {"HF_TOKEN": "s", "FEDTUNE_PARENT": "1", "FEDTUNE_PASSPHRASE": "s", "SSH_AUTH_SOCK": "s", "X": "s"}
    assert script_environment(env | more) == env


def pids(folder: Path) -> list[int]:
    wait_for((folder / "pids").exists, "what the script starts")
    return [int(word) for word in (folder / "pids").read_text().split()]


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
def test_all_that_a_script_has_started_ends_with_it(site: SiteConfig, tmp_path: Path) -> None:
    """When it is stopped, and when it is killed or ends by itself: then it is started again."""
    (tmp_path / "mine.py").write_text(STARTS)
    place = tmp_path / "home" / "trainer"
    with running(script_program(site)) as program:
        before = pids(place)
        (place / "pids").unlink()
        os.kill(before[0], signal.SIGKILL)
        wait_for(lambda: not any(map(alive, before)), "the end of all")
        wait_for(lambda: program.look() or (place / "pids").exists(), "another life")
        now = pids(place)
        assert program.lives == 2 and all(map(alive, now))
    wait_for(lambda: not any(map(alive, now)), "the end of all")


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
def test_all_that_a_script_has_started_ends_with_a_client_that_is_killed(
    site: SiteConfig, tmp_path: Path
) -> None:
    (tmp_path / "mine.py").write_text(STARTS)
    site.write(tmp_path / "site.json")
    client = (
        "import sys, time; from pathlib import Path; "
        "from fedtune.deploy.script_program import script_program; "
        "from fedtune.deploy.site_config import SiteConfig; "
        "script_program(SiteConfig.read(Path(sys.argv[1]))).look(); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", client, str(tmp_path / "site.json")]) as process:
        found = pids(tmp_path / "home" / "trainer")
        assert all(map(alive, found))
        process.kill()
    wait_for(lambda: not any(map(alive, found)), "the end of all")

"""Programs that are looked after: a pause before each new life, an end to patience, and no orphans."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fedtune.deploy import supervisor
from fedtune.deploy.supervisor import TRIES, Program
from fedtune.errors import FedtuneError
from tests.waiting import PATIENCE, wait_for

SLEEP = (sys.executable, "-c", "import time; print('here', flush=True); time.sleep(600)")


def program(folder: Path, *command: str) -> Program:
    return Program("it", command, folder / "logs" / "it.log", dict(os.environ))


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_program_that_dies_is_started_again_after_a_pause(tmp_path: Path) -> None:
    it = program(tmp_path, *SLEEP)
    it.look()
    assert it.process is not None
    first = it.process.pid
    wait_for(lambda: it.log.exists() and it.log.read_text() == "here\n", "its first word")
    os.kill(first, signal.SIGKILL)
    wait_for(lambda: it.look() or it.process is None, "its death to be noticed")
    it.look()
    assert it.process is None and it.lives == 1  # half a second must pass
    wait_for(lambda: it.look() or it.process is not None, "its next life")
    assert it.process is not None and it.process.pid != first and it.lives == 2
    wait_for(lambda: it.log.read_text() == "here\nhere\n", "both lives in the log")
    it.stop()
    assert it.process is None


def test_a_program_that_dies_again_and_again_is_given_up_with_its_last_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "FIRST", 0.0)
    it = program(tmp_path, sys.executable, "-SEc", "print('port taken'); raise SystemExit(3)")

    def look() -> bool:
        it.look()
        return False

    with pytest.raises(
        FedtuneError,
        match=rf"F505: 'it' stopped {TRIES + 1} times in a row \(code 3; its last line: port taken\).*look at "
        rf"{it.log}",
    ):
        wait_for(look, "the end of patience", every=0.01)
    assert it.lives == TRIES + 1


def test_a_program_that_was_well_for_a_while_starts_counting_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "FIRST", 0.0)
    monkeypatch.setattr(supervisor, "STEADY", -1.0)
    it = program(tmp_path, sys.executable, "-SEc", "pass")
    wait_for(lambda: it.look() or it.lives > TRIES + 3, "many lives", every=0.01)
    assert it.deaths == 1


def test_a_program_that_does_not_listen_to_sigterm_is_killed(tmp_path: Path) -> None:
    it = program(
        tmp_path,
        sys.executable,
        "-c",
        "import signal, time; signal.signal(15, signal.SIG_IGN); print('deaf', flush=True); time.sleep(600)",
    )
    it.look()
    wait_for(lambda: it.log.read_text() == "deaf\n", "its first word")
    assert it.process is not None
    pid = it.process.pid
    it.stop(0.2)
    assert not alive(pid)


WATCHED = (
    "from fedtune.deploy.supervisor import PARENT, end_with; import os, time; "
    "end_with(int(os.environ[PARENT])); time.sleep(600)"
)
PARENT = """
import sys, time
from pathlib import Path
from fedtune.deploy.supervisor import Program, environment
folder = Path(sys.argv[1])
it = Program("it", (sys.executable, "-c", "import time; time.sleep(600)"), folder / "it.log", environment(folder))
other = Program("other", (sys.executable, "-c", sys.argv[2]), folder / "other.log", environment(folder))
it.look(), other.look()
print(it.process.pid, other.process.pid, flush=True)
time.sleep(600)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
def test_children_end_with_a_parent_that_was_killed(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tmp_path), WATCHED], stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        children = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(children) == 2 and all(map(alive, children))
        parent.kill()
    wait_for(lambda: not any(map(alive, children)), "the children's end")


def test_a_grandchild_ends_when_the_program_above_is_gone(tmp_path: Path) -> None:
    """What Flower's own programs start has another parent: it looks itself whether fedtune is there."""
    watcher = (
        "from fedtune.deploy.supervisor import end_with; import sys, time; end_with(int(sys.argv[1])); "
        "print('up', flush=True); time.sleep(600)"
    )
    above = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    with subprocess.Popen(
        [sys.executable, "-c", watcher, str(above.pid)], stdout=subprocess.PIPE, text=True
    ) as below:
        assert below.stdout is not None and below.stdout.readline() == "up\n"
        above.kill()
        above.wait()
        assert below.wait(PATIENCE) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
def test_an_app_of_flowers_ends_with_whoever_started_it(tmp_path: Path) -> None:
    """The app itself is asked for its help text when nobody kills its parent; with a pipe for a terminal it
    waits for us."""
    folder = supervisor.leashed(tmp_path)
    assert (
        "--runtime-api-address"
        in subprocess.run(
            [folder / "flwr-clientapp", "--help"],
            capture_output=True,
            text=True,
            check=True,
            timeout=PATIENCE,
        ).stdout
    )
    wait = (
        (folder / "flwr-clientapp")
        .read_text()
        .replace(str(Path(sys.executable).parent / "flwr-clientapp"), f"'{sys.executable}' -c 'input()'")
    )
    (folder / "flwr-clientapp").write_text(wait)
    starts = (
        f"import subprocess, time; print(subprocess.Popen(['{folder / 'flwr-clientapp'}'], "
        "stdin=subprocess.PIPE).pid, flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", starts], stdout=subprocess.PIPE, text=True) as superexec:
        assert superexec.stdout is not None
        app = int(superexec.stdout.readline())
        wait_for(lambda: b"input()" in Path(f"/proc/{app}/cmdline").read_bytes().split(b"\0"), "the app")
        superexec.kill()
    wait_for(lambda: not alive(app), "the app's end")


def test_programs_of_this_interpreter_come_first_and_flower_has_a_home_of_its_own(tmp_path: Path) -> None:
    env = supervisor.environment(tmp_path)
    assert env["PATH"].split(os.pathsep)[1] == str(Path(sys.executable).parent) and env["FLWR_HOME"] == str(
        tmp_path
    )
    assert env["FLWR_TELEMETRY_ENABLED"] == "0" and env[supervisor.PARENT] == str(os.getpid())

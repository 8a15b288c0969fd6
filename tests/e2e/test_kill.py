"""SIGKILL at any moment, then `fedtune resume`: the bytes of an undisturbed run."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest

from fedtune.runtime.folder import RunFolder, recipe_of
from fedtune.runtime.run import run
from tests import small
from tests.forked import Program

CHANGES = {"chain": [{"step": "sign", "error_feedback": True}], "rounds": 4, "evaluate__centralised": True}
DIE_IN = """
import importlib, os, signal, sys
module = importlib.import_module("{module}")
real, calls = module.{name}, 0
def dying(*arguments, **more):
    global calls
    calls += 1
    if {when}:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*arguments, **more)
module.{name} = dying
from fedtune.cli import main
main(["resume", sys.argv[1]])
"""


@pytest.fixture(scope="module")
def undisturbed(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The config of a run, and the digest that it ends with."""
    root = tmp_path_factory.mktemp("kill")
    folder, result, _ = small.play(small.recipe(tiny_bert, small.write_rows(root), **CHANGES), root)
    return folder.path / "config.json", result["state_sha256"]


def fresh(config: Path, root: Path) -> RunFolder:
    folder = RunFolder(root / "run")
    (folder.path / "state").mkdir(parents=True)
    (folder.path / "config.json").write_bytes(config.read_bytes())
    return folder


@pytest.mark.parametrize(
    ("place", "when"),
    [
        pytest.param(
            "fedtune.runtime.run:save_state", "arguments[1] == 2", marks=pytest.mark.thorough
        ),  # before the state of round 2 is written
        (
            "fedtune.runtime.run:digest",
            "calls == 2",
        ),  # after it and the clients' states are written, before the row is committed
        pytest.param(
            "fedtune.runtime.run:prune_states", "arguments[1] == 3", marks=pytest.mark.thorough
        ),  # after the commit of round 3
        ("fedtune.runtime.run:compare", "True"),  # after the last round, before any score
        pytest.param(
            "fedtune.runtime.run:summary", "True", marks=pytest.mark.thorough
        ),  # after the scores, before adapter and result
        ("fedtune.exports:swap", "True"),  # the adapter is written, but not in its place
    ],
)
def test_a_run_killed_at_a_named_point_ends_with_the_same_bytes(
    place: str, when: str, undisturbed: tuple[Path, str], tmp_path: Path
) -> None:
    config, want = undisturbed
    folder = fresh(config, tmp_path)
    module, _, name = place.partition(":")
    program = DIE_IN.format(module=module, name=name, when=when)
    died = Program("-c", program, str(folder.path)).finish()
    assert died.returncode == -signal.SIGKILL, died.stderr
    assert not (folder.path / "result.json").exists()
    assert run(recipe_of(folder), folder, lambda event: None)["state_sha256"] == want
    assert (folder.path / "adapter" / "adapter_model.safetensors").exists() and not list(
        folder.path.glob("**/*.part")
    )


def test_a_run_killed_again_and_again_ends_with_the_same_bytes(
    undisturbed: tuple[Path, str], tmp_path: Path
) -> None:
    """Killed from outside as soon as it has done something new, until it is through."""
    config, want = undisturbed
    folder = fresh(config, tmp_path)
    kills = 0
    for patience in (1, 4, 6):
        process = Program("-m", "fedtune", "resume", str(folder.path))
        seen = told(folder)
        deadline = time.monotonic() + 60
        while process.poll() is None and told(folder) < seen + patience and time.monotonic() < deadline:
            time.sleep(0.005)
        process.kill()
        kills += process.wait() == -signal.SIGKILL
    assert kills >= 2
    assert run(recipe_of(folder), folder, lambda event: None)["state_sha256"] == want


def told(folder: RunFolder) -> int:
    """Answers that the run has told so far."""
    path = folder.path / "events.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return sum(
        json.loads(line)["event"] in ("ClientDone", "RoundDone") for line in lines if line.endswith("}")
    )

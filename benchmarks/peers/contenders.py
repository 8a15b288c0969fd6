"""The contenders: how each is started, goes on after a kill, and says how it ended."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PEERS = {
    "loop": "plain loop",
    "flower": "Flower",
    "nvflare": "NVFLARE",
    "pfl": "pfl-research",
}  # with code of a user
OURS = {"fedtune": "fedtune", "fedtune-flower": "fedtune on Flower's engine"}
OPTIONAL = ("nvflare", "pfl")  # environments of their own


@dataclass(frozen=True)
class Work:
    """The same for everybody. data: a folder of train.jsonl and test.jsonl with text, label, client."""

    data: Path
    model: Path
    clients: int
    rounds: int
    steps: int


@dataclass(frozen=True)
class Ended:
    """What measure.py says of a run, and what the run says of itself; None where it did not get there."""

    code: int | None
    cpu: float
    start_cpu: float | None  # before the first local step
    peak_bytes: int
    processes: int
    accuracy: float | None
    digest: str | None
    finite: bool | None
    up_bytes: float | None
    first_round: int | None  # the first round that was trained in this process


def lines_of(name: str) -> int:
    """Lines that a user writes: neither blank, nor comments, nor the benchmark's; the shared part included."""
    if name in OURS:
        files, shared = [HERE / "fedtune" / "recipe.toml"], 0
    else:
        files, shared = sorted((HERE / name).glob("*.py")), written(HERE / "task.py")
    return sum(map(written, files)) + shared


def written(file: Path) -> int:
    lines = [line.strip() for line in file.read_text().splitlines()]
    return sum(bool(line) and not line.startswith("#") and "# probe" not in line for line in lines)


def command(name: str, work: Work, place: Path, again: bool, fault: bool) -> list[str]:
    """What is typed; `again` after a kill in the same place."""
    if name not in OURS:
        return [str(HERE / name / "main.py")]
    if again:
        return ["-m", "fedtune", "resume", str(place / "runs" / "run")]
    sets = {
        "model.name": work.model,
        "data.path": work.data,
        "partition.clients": work.clients,
        "rounds": work.rounds,
        "method.train.steps": work.steps,
        "name": "run",
    } | ({"chain": '[{step = "fault"}]'} if fault else {})
    engine = ["--engine", "flower"] if name == "fedtune-flower" else ["--workers", "1"]
    recipe = str(HERE / "fedtune" / "recipe.toml")
    changes = [f"--set={key}={value}" for key, value in sets.items()]
    return ["-m", "fedtune", "simulate", recipe, "--runs", str(place / "runs"), *engine, *changes]


def play(
    name: str, python: str, work: Work, place: Path, fault: str = "", kill: bool = False, again: bool = False
) -> Ended:
    """One run in fresh processes, measured.

    fault  nan:CLIENT or raise:CLIENT, from round 2 on
    kill   SIGKILL to all of it as round 2 begins
    again  in the place of a run that was killed
    """
    place.mkdir(parents=True, exist_ok=True)
    log = place / ("again.jsonl" if again else "log.jsonl")
    known = os.environ | {
        "PEERS_LOG": str(log), "PEERS_FAULT": fault, "PEERS_DATA": str(work.data), "PEERS_MODEL": str(work.model),
        "PEERS_CLIENTS": str(work.clients), "PEERS_ROUNDS": str(work.rounds), "PEERS_STEPS": str(work.steps),
        "PEERS_WORK": str(place / "work"), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore", "FLWR_TELEMETRY_ENABLED": "0", "FLWR_HOME": str(place / "flwr"),
        "FLWR_DISABLE_UPDATE_CHECK": "1",
    }  # fmt: skip
    paths = [HERE, HERE / name, plugin(place), ROOT] if name not in OURS else [HERE, plugin(place), ROOT]
    known["PYTHONPATH"] = os.pathsep.join(map(str, paths))
    typed = command(name, work, place, again, bool(fault))
    marks, kill_at = (log, '"train"'), work.clients + 1
    if name in OURS:
        marks, kill_at = (place / "runs" / "run" / "events.jsonl", '"RoundStarted"'), 2
    watch = [sys.executable, str(HERE / "measure.py"), "--marks", *map(str, marks)]
    watch += ["--kill-at", str(kill_at if kill else 0), "--", python, *typed]
    with (place / "output.txt").open("a") as output:
        done = subprocess.run(watch, env=known, stdout=subprocess.PIPE, stderr=output, text=True, check=True)
    measured = json.loads(done.stdout.splitlines()[-1])
    notes = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    return ended(measured, notes, place / "runs" / "run" if name in OURS else None, "flower" in name)


def plugin(place: Path) -> Path:
    """A folder in which fedtune finds the step `fault`, as pip would have installed it."""
    about = place / "site" / "peers_fault-1.0.dist-info"
    about.mkdir(parents=True, exist_ok=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: peers-fault\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[fedtune.steps]\nfault = peers_fault:Fault\n")
    (place / "site" / "peers_fault.py").write_text((HERE / "fedtune" / "fault.py").read_text())
    return place / "site"


def ended(measured: dict[str, Any], notes: Sequence[dict[str, Any]], run: Path | None, engine: bool) -> Ended:
    last = next((note for note in notes if note["event"] == "end"), {})
    sent = [note["bytes"] for note in notes if note["event"] == "sent"]
    first = next((note["round"] for note in notes if note["event"] == "train"), None)
    up = sum(sent) / len(sent) if sent else None
    if run and (run / "result.json").exists():
        result = json.loads((run / "result.json").read_text())
        last = {"accuracy": result["federated"], "digest": result["state_sha256"], "finite": finite(run)}
        up = result["up_bytes_per_client_round"]
        events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
        first = 1 + [event["resumed_after"] for event in events if event["event"] == "RunStarted"][-1]
    # Flower's engine starts its actors after fedtune has opened the round: nothing tells from outside when they train
    start = None if run and engine else measured["start_cpu"]
    return Ended(
        measured["code"], measured["cpu"], start, measured["peak_bytes"], measured["processes"],
        last.get("accuracy"), last.get("digest"), last.get("finite"), up, first,
    )  # fmt: skip


def finite(run: Path) -> bool:
    import numpy as np
    from safetensors.numpy import load_file

    states = sorted((run / "state").glob("*.safetensors"))
    return all(bool(np.isfinite(value).all()) for value in load_file(states[-1]).values())

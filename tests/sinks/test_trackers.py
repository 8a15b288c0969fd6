"""What trackers were told, read back by their own libraries: every figure of every round once, also after a kill."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedtune.config import parse
from fedtune.errors import FedtuneError
from fedtune.events import ClientDone, Event, RoundDone, RunDone, RunStarted, Scored, Sink
from fedtune.sinks import SINKS, sink_of
from fedtune.sinks.tracked import Tracked
from tests import small
from tests.forked import Program

Figures = dict[str, list[tuple[int, float]]]


def of_tensorboard(folder: Path) -> Figures:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder / "tensorboard"), size_guidance={"tensors": 0, "scalars": 0})
    read.Reload()
    return {tag: [(one.step, one.value) for one in read.Scalars(tag)] for tag in read.Tags()["scalars"]}


def of_mlflow(folder: Path) -> Figures:
    from mlflow.tracking import MlflowClient

    client = MlflowClient((folder.parent / "mlruns").as_uri())
    experiment = client.get_experiment_by_name("fedtune")
    (run,) = client.search_runs([experiment.experiment_id])  # one, also of a run that went on
    assert run.data.params["rounds"] and run.info.run_name == folder.name
    return {
        key: [(one.step, one.value) for one in client.get_metric_history(run.info.run_id, key)]
        for key in run.data.metrics
    }


def of_wandb(folder: Path) -> Figures:
    """From the files that `wandb sync` sends: records of wandb's own format."""
    from wandb.proto import wandb_internal_pb2 as pb
    from wandb.sdk.internal.datastore import DataStore

    found: Figures = {}
    for path in sorted((folder / "wandb").glob("offline-run-*/*.wandb")):
        store = DataStore()
        store.open_for_scan(str(path))
        while (data := store.scan_data()) is not None:
            record = pb.Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "history":
                row = {
                    item.key or "/".join(item.nested_key): json.loads(item.value_json)
                    for item in record.history.item
                }
                for key, value in row.items():
                    if not key.startswith("_") and key != "round_number":
                        found.setdefault(key, []).append((row["round_number"], value))
    return found


TRACKERS: dict[str, tuple[str, Callable[[Path], Figures]]] = {
    "tensorboard": ("tensorboard", of_tensorboard),
    "mlflow": ("mlflow", of_mlflow),
    "wandb": ("wandb", of_wandb),
}
KILLED = """
import os, signal, sys
from pathlib import Path
from fedtune.events import RoundDone
from fedtune.runtime.folder import existing, recipe_of
from fedtune.runtime.run import run
from fedtune.sinks import sink_of
folder = existing(sys.argv[1]); recipe = recipe_of(folder)
def die(event):
    if isinstance(event, RoundDone) and event.round == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)  # its line is in events.jsonl, and the trackers know nothing of it
run(recipe, folder, sink_of(folder.path, recipe.sinks, die))
"""


def once(figures: Figures) -> dict[str, dict[int, float]]:
    """By name and round; no round twice."""
    for name, points in figures.items():
        steps = [step for step, _ in points]
        assert len(steps) == len(set(steps)), f"{name} has a step twice: {steps}"
    return {name: dict(points) for name, points in figures.items()}


def among(values: dict[int, float], rounds: set[int]) -> Any:
    return pytest.approx({number: value for number, value in values.items() if number in rounds}, rel=1e-6)


@pytest.mark.parametrize(
    "name",
    [
        "tensorboard",
        pytest.param("mlflow", marks=pytest.mark.thorough),
        pytest.param("wandb", marks=pytest.mark.slow),
    ],
)  # Weights & Biases waits two minutes for its own process, which died with the run
def test_a_run_that_was_killed_and_went_on(
    name: str, tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package, read = TRACKERS[name]
    pytest.importorskip(package, reason=f"{package} is not installed (pip install 'fedtune[trackers]')")
    for key in ("WANDB_SILENT", "WANDB_DISABLE_GIT"):
        monkeypatch.setenv(key, "true")
    evaluate = {"base": True, "local": False, "centralised": False, "every": 1, "clients": False}
    recipe = small.recipe(
        tiny_bert, small.write_rows(tmp_path), evaluate=evaluate, sinks=[{"sink": name}],
        method__train={"lr": 0.01, "steps": 1, "batch": 4},
    )  # fmt: skip
    folder = tmp_path / "runs" / "tracked"
    (folder / "state").mkdir(parents=True)
    (folder / "config.json").write_text(recipe.model_dump_json())
    done = Program("-c", KILLED, str(folder), "2").finish()
    assert done.returncode == -signal.SIGKILL, done.stderr
    done = Program("-c", KILLED, str(folder), "99").finish()
    assert done.returncode == 0, done.stderr

    told = once(read(folder))
    if name == "wandb":  # whose own process writes a little later, and so loses what came just before a kill
        present = set(told["round/loss"])
        assert {2, 3} <= present
    else:
        present = {1, 2, 3}
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    assert not [event for event in events if "failed and is told nothing more" in event.get("text", "")]
    rounds = {e["round"]: e["metrics"]["loss"] for e in events if e["event"] == "RoundDone"}
    assert set(rounds) == {1, 2, 3} and told["round/loss"] == among(rounds, present)
    losses = {
        e["round"]: e["metrics"]["loss"] for e in events if e["event"] == "ClientDone" and e["client"] == 0
    }
    assert told["clients/client-0/loss"] == among(losses, present)
    scores = {e["round"]: e["value"] for e in events if e["event"] == "Scored" and e["phase"] == "held-out"}
    assert told["held-out/accuracy"] == among(scores, set(told["held-out/accuracy"]) | {2, 3})
    assert name == "wandb" or (
        set(told["base/accuracy"]) == {0} and set(told["held-out/accuracy"]) == {1, 2, 3}
    )


class Heard:
    """A tracker that only listens."""

    def __init__(self) -> None:
        self.steps: list[tuple[int, dict[str, float]]] = []
        self.closed: Any = None

    def figures(self, step: int, values: Any) -> None:
        self.steps.append((step, dict(values)))

    def close(self, result: Any) -> None:
        self.closed = result


def done(number: int) -> RoundDone:
    return RoundDone(number, 1, 0, 1, 1, 0.5, {"loss": 1.0 / number, "odd": float("nan")})


def test_what_was_missed_is_told_and_nothing_twice(tmp_path: Path) -> None:
    heard, tell = Heard(), sink_of(tmp_path, [])
    opened: list[str] = []

    def opens(known: str, run: str, folder: Path) -> tuple[Heard, str]:
        opened.append(known)
        return heard, "number-7"

    def sink(clients: bool = True) -> Tracked:
        return Tracked(tmp_path / "x.json", tmp_path, opens, clients)

    def say(to: Sink, *events: Event) -> None:
        for event in events:
            tell(event)
            to(event)

    client = ClientDone(1, 0, "a", 4.0, 10, 10, {"loss": 2.0}, 0.25)
    say(
        sink(), RunStarted("r", "r", 3, 1, 1, 1), client, done(1), Scored("held-out", 1, "accuracy", 0.5, 1.0)
    )
    tell(done(2))  # the process is killed before its sinks hear it
    say(sink(), RunStarted("r", "r", 3, 1, 1, 1, resumed_after=2), done(3), RunDone({"rounds": 3}))
    assert opened == ["", "number-7"] and heard.closed == {"rounds": 3}
    assert [step for step, values in heard.steps if "round/loss" in values] == [1, 2, 3]
    first = heard.steps[0][1]
    assert first["clients/a/loss"] == 2.0 and first["clients/a/weight"] == 4.0 and "round/odd" not in first
    assert [values for _, values in heard.steps if "held-out/accuracy" in values] == [
        {"held-out/accuracy": 0.5, "held-out/loss": 1.0}
    ]


def test_a_tracker_that_is_not_installed_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedtune.sinks.trackers.find_spec", lambda package: None)
    for name in TRACKERS:
        (table,) = parse({"sinks": [{"sink": name}]}).sinks
        assert isinstance(table, SINKS[name])
        with pytest.raises(FedtuneError, match=rf"D208: sink = '{name}' needs .*fedtune\[trackers\]"):
            table.open(tmp_path)

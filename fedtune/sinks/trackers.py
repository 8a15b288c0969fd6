"""Trackers that a recipe can name: TensorBoard, Weights & Biases, MLflow. Each is its own library's work;
what they are told is the same (tracked.py).

Left out after a look: Trackio, which brings Gradio and pandas with it, and Aim, which has no release for the
newer Pythons; both read what the others write.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from fedtune.disk import disk_errors
from fedtune.errors import FedtuneError
from fedtune.events import Sink
from fedtune.sinks.base import SinkSettings
from fedtune.sinks.tracked import Opens, Tracked, Tracker, numbers, settings


class TrackerSettings(SinkSettings):
    """What all trackers are told."""

    clients: bool = True
    """Curves of single clients, too: of the first hundred."""

    def tracked(self, folder: Path, package: str, opens: Opens) -> Sink:
        """Raises D208 where the tracker's package is missing."""
        if find_spec(package) is None:
            raise FedtuneError(
                "D208",
                sentence=f"sink = '{self.sink}' needs {package}, which is not installed",
                do="run: pip install 'fedtune[trackers]'",
            )
        return Tracked(folder / f"{self.sink}.json", folder, opens, self.clients)


class TensorBoardTable(TrackerSettings):
    """sink = "tensorboard": event files, for `tensorboard --logdir runs`."""

    sink: Literal["tensorboard"] = "tensorboard"
    path: str = "tensorboard"
    """Where to write; relative to the run's folder."""

    def open(self, folder: Path) -> Sink:
        where = folder / Path(self.path).expanduser()
        return self.tracked(folder, "tensorboard", lambda known, run, at: (TensorBoard(where), str(where)))


class TensorBoard:
    """One file of records. Not TensorBoard's own writer, whose thread would keep the run's process from
    forking (fedtune.forks)."""

    def __init__(self, where: Path) -> None:
        from tensorboard.compat.proto.event_pb2 import Event as Entry
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        self.entry, self.summary = Entry, Summary
        with disk_errors(where):
            where.mkdir(parents=True, exist_ok=True)
            name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}"
            self.file = (where / name).open("wb")
        self.records = RecordWriter(self.file)
        self.records.write(Entry(wall_time=time.time(), file_version="brain.Event:2").SerializeToString())

    def figures(self, step: int, values: Mapping[str, float]) -> None:
        said = [self.summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        entry = self.entry(wall_time=time.time(), step=step, summary=self.summary(value=said))
        self.records.write(entry.SerializeToString())
        self.records.flush()

    def close(self, result: Mapping[str, Any]) -> None:
        self.figures(int(result["rounds"]), {f"result/{name}": v for name, v in numbers(result).items()})
        self.records.close()


class WandBTable(TrackerSettings):
    """sink = "wandb": Weights & Biases."""

    sink: Literal["wandb"] = "wandb"
    project: str = "fedtune"
    mode: Literal["offline", "online"] = "offline"
    """offline: into the run's folder, for `wandb sync` later; online: sent to the service as it happens, by
    the login of this machine."""

    def open(self, folder: Path) -> Sink:
        def opens(known: str, run: str, at: Path) -> tuple[Tracker, str]:
            tracker = WandB(self, known, run, at)
            return tracker, tracker.run.id

        return self.tracked(folder, "wandb", opens)


class WandB:
    def __init__(self, table: WandBTable, known: str, run: str, folder: Path) -> None:
        import wandb

        self.run = wandb.init(
            project=table.project,
            name=run,
            id=known or None,
            resume="allow" if known else None,
            mode=table.mode,
            dir=str(folder),
            config=settings(folder),
            settings=wandb.Settings(silent=True, console="off", disable_git=True, disable_code=True,
                                    x_disable_stats=True),
        )  # fmt: skip
        self.run.define_metric("round_number")
        self.run.define_metric("*", step_metric="round_number")

    def figures(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log({**values, "round_number": step})

    def close(self, result: Mapping[str, Any]) -> None:
        self.run.summary.update({f"result/{name}": value for name, value in numbers(result).items()})
        self.run.finish()


class MLflowTable(TrackerSettings):
    """sink = "mlflow": MLflow."""

    sink: Literal["mlflow"] = "mlflow"
    tracking: str = ""
    """The tracking server's URI, or a folder; empty: mlruns/ beside the run's folder."""
    experiment: str = "fedtune"

    def open(self, folder: Path) -> Sink:
        def opens(known: str, run: str, at: Path) -> tuple[Tracker, str]:
            tracker = MLflow(self, known, run, at)
            return tracker, tracker.run

        return self.tracked(folder, "mlflow", opens)


class MLflow:
    def __init__(self, table: MLflowTable, known: str, run: str, folder: Path) -> None:
        from mlflow.tracking import MlflowClient

        where = table.tracking or (folder.resolve().parent / "mlruns").as_uri()
        self.client = MlflowClient(where if "://" in where else Path(where).expanduser().resolve().as_uri())
        if known:
            self.run = known
            return
        found = self.client.get_experiment_by_name(table.experiment)
        number = found.experiment_id if found else self.client.create_experiment(table.experiment)
        self.run = str(self.client.create_run(number, run_name=run).info.run_id)
        for key, value in settings(folder).items():
            self.client.log_param(self.run, key, str(value)[:500])

    def figures(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.client.log_metric(self.run, allowed(name), value, step=step)

    def close(self, result: Mapping[str, Any]) -> None:
        self.figures(int(result["rounds"]), {f"result/{name}": v for name, v in numbers(result).items()})
        self.client.set_terminated(self.run)


def allowed(name: str) -> str:
    """A name that MLflow takes: letters, digits, and _ - . space : /

    >>> allowed("clients/site-ä(1)/loss")
    'clients/site-ä_1_/loss'
    """
    return "".join(sign if sign.isalnum() or sign in "_-. :/" else "_" for sign in name)

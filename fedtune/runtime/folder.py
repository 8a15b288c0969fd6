"""A run's folder: the truth about a run. Everything is written so that a crash leaves the old or the new,
never a half.

config.json  journal.db  state/round-NNNN.safetensors  events.jsonl  result.json  adapter/  adapter-last/
experts.json  report.html
"""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from pydantic import ValidationError

from fedtune.config import Recipe, without_idle
from fedtune.disk import disk_errors, json_text, took, write_atomic
from fedtune.errors import FedtuneError

EXPERTS = "experts.json"  # what `fedtune experts eval` found
EFFECTS = "effects.json"  # what `fedtune eval --what` found


@dataclass(frozen=True)
class RunFolder:
    """Paths and atomic writes of one run."""

    path: Path

    @property
    def journal(self) -> Path:
        return self.path / "journal.db"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def last_adapter(self) -> Path:
        """Of the last round, where adapter/ is of a better one."""
        return self.path / "adapter-last"

    def state(self, number: int) -> Path:
        return self.path / "state" / f"round-{number:04d}.safetensors"

    def client_state(self, client: int, number: int) -> Path:
        """What a client keeps after a round; the folder has the name that older runs gave it."""
        return self.path / "memory" / f"client-{client:05d}" / f"round-{number:04d}.safetensors"

    def begin(self, recipe: Recipe) -> None:
        """Say what is run here, and from where its relative paths are meant."""
        self.write_json("config.json", recipe.model_dump(mode="json"))
        self.write_json("origin.json", {"working_directory": str(Path.cwd())})

    def origin(self) -> Path | None:
        """Where the recipe's relative paths are meant from; None (the working directory) where nobody said,
        or where that folder is gone."""
        if not (self.path / "origin.json").exists():
            return None
        place = Path(str(self.read_json("origin.json")["working_directory"]))
        return place if place.is_dir() else None

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        write_atomic(self.path / name, json_text(content, indent=2).encode() + b"\n")

    def read_json(self, name: str) -> dict[str, Any]:
        try:
            content = json.loads((self.path / name).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise FedtuneError(
                "R402",
                f"no readable {name} in '{self.path}' ({type(error).__name__})",
                "the folder of a run",
                "check the path, or list runs/",
            ) from None
        if not isinstance(content, dict):
            raise FedtuneError(
                "R402",
                f"a {name} in '{self.path}' that is not a table",
                "the folder of a run",
                "check the path, or list runs/",
            )
        return content

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run for this process; the lock falls with the process, however it dies. Raises R407."""
        with open_for_write(self.path / "lock") as handle:
            for _ in range(4):  # fedtune server takes it for an instant, to see whether somebody has it
                if took(handle):
                    break
                time.sleep(0.1)
            else:
                if not took(handle):
                    raise FedtuneError(
                        "R407",
                        sentence=f"another process is working in '{self.path}'",
                        do="wait for it to end, or stop it",
                    )
            yield


def create(root: Path, name: str, stem: str) -> RunFolder:
    """A new folder: `name` if given (R401 where it exists), else the stem and the first free number."""
    if name:
        return RunFolder(make(root / name))
    number = 1
    while True:
        path = root / (stem if number == 1 else f"{stem}-{number}")
        if not path.exists():
            with contextlib.suppress(Taken):  # another process was quicker
                return RunFolder(make(path))
        number += 1


def discard_if_empty(folder: RunFolder) -> None:
    """After a mistake: a folder without a committed round holds nothing worth keeping, and its name is wanted
    for the next try."""
    if not any((folder.path / "state").glob("round-*.safetensors")):
        shutil.rmtree(folder.path, ignore_errors=True)


def make(path: Path) -> Path:
    if path.exists():
        raise taken(path)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    try:
        path.mkdir()
    except FileExistsError:
        raise taken(path) from None
    except OSError:
        with disk_errors(path):
            raise
    (path / "state").mkdir()
    return path


class Taken(FedtuneError):
    """A run folder exists already."""


def taken(path: Path) -> Taken:
    return Taken(
        "R401",
        sentence=f"the run folder '{path}' already exists",
        do=f"choose another name, or continue that run with: fedtune resume {path}",
    )


def existing(path: str | Path) -> RunFolder:
    """The folder of a run that was started before. Raises R402."""
    folder = RunFolder(Path(path))
    folder.read_json("config.json")
    return folder


def open_for_write(path: Path) -> IO[str]:
    with disk_errors(path):
        return path.open("a", encoding="utf-8")


def recipe_of(folder: RunFolder) -> Recipe:
    """The resolved recipe of a run. Raises R402."""
    try:
        return Recipe.model_validate_json(json.dumps(without_idle(folder.read_json("config.json"), Recipe)))
    except ValidationError as error:
        found = (
            f"a config.json in '{folder.path}' that this version cannot read ({error.error_count()} mistakes)"
        )
        raise FedtuneError(
            "R402", found, "the config.json of a run", "use the version of fedtune that started the run"
        ) from None

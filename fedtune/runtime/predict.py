"""fedtune predict: a run's model, or an exported adapter, on the rows of a file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedtune.data.rows import shape
from fedtune.data.settings import Source
from fedtune.data.sources import SOURCES, data_at
from fedtune.errors import FedtuneError
from fedtune.runtime.finished import installed, loaded
from fedtune.runtime.folder import existing
from fedtune.runtime.steered import asked_to_steer, steered_by_answers
from fedtune.runtime.workspace import how_to_encode

if TYPE_CHECKING:
    from fedtune.model.tunable import TunableModel

PART = 512  # rows that are answered before the first answer is written
LONGEST = 1024  # tokens of a text, where no recipe says
COLUMNS = {"instruct": "prompt", "image-classify": "image", "classify": "text"}  # what a row is asked by


def predicted(
    folder: Path,
    path: str,
    column: str = "",
    batch: int = 32,
    tokens: int = 128,
    which: str = "best",
    steer: str = "",
    weight: float | None = None,
) -> Iterator[dict[str, Any]]:
    """Every row of the file as it was, with `prediction` and, for classes, `probability` and
    `probabilities`; all of them null where the row has no text.

    column  of the text or prompt, where it is not the recipe's (an adapter's folder knows no recipe)
    steer   a big model that answers in the place of this one, which steers it: rows have `steer_weight`, too
    weight  how far; None is found

    Raises D201, D203, D204 (no such column), M304 (neither run nor adapter), M306 (nothing to predict).
    """
    from fedtune.model.predict import refuse_unpredictable

    wish = asked_to_steer(steer, weight)
    tunable, data = model_of(folder, which)
    if data.task == "preference" and data.prompt:  # what it learned from pairs is to write responses
        data = data.model_copy(update={"task": "instruct"})
    task = data.task
    refuse_unpredictable(task)
    asked = data_at(data, path, **({COLUMNS[task]: column} if column else {}))
    rows = asked.table().rows
    also: dict[str, Any] = {}
    if wish is not None:
        tunable, weight = steered_by_answers(tunable, asked, wish, shaped(asked, rows[:PART], path, 0))
        also = {"steer_weight": weight}
    for start in range(0, len(rows), PART):
        for row in answered(tunable, asked, rows[start : start + PART], path, start, batch, tokens):
            yield row | also


def answered(
    tunable: TunableModel,
    data: Source,
    rows: Sequence[Any],
    path: str,
    start: int,
    batch: int,
    tokens: int,
) -> Iterator[dict[str, Any]]:
    """Some rows of a file, from row `start` on."""
    from fedtune.model.predict import classes_of, responses_of

    how, asked = how_to_encode(data, scored=True), shaped(data, rows, path, start)
    known = [row for row in asked if row is not None]
    if data.task == "instruct":
        talk = {key: how[key] for key in ("template", "system", "day")}
        said = iter([{"prediction": text} for text in responses_of(tunable, known, tokens, batch, **talk)])
        nothing: dict[str, Any] = {"prediction": None}
    else:
        said = iter([likeliest(shares) for shares in classes_of(tunable, known, batch, **how)])
        nothing = {"prediction": None, "probability": None, "probabilities": None}
    for row, mine in zip(rows, asked, strict=True):
        yield {**row} | (nothing if mine is None else next(said))


def shaped(data: Source, rows: Sequence[Any], path: str, start: int) -> list[dict[str, Any] | None]:
    """Rows as the task has them, with something in the place of the answer; None for one without a text."""
    from fedtune.model.predict import UNKNOWN

    free = data.model_copy(update={"labels": ()})
    unknown = {data.response if data.task == "instruct" else data.label: UNKNOWN}
    return [
        shape(free, {**row, **unknown}, f"row {number} of {path}", Path(path).parent)
        for number, row in enumerate(rows, start + 1)
    ]


def likeliest(shares: dict[str, float]) -> dict[str, Any]:
    label = max(shares, key=lambda name: shares[name])
    return {"prediction": label, "probability": shares[label], "probabilities": shares}


def model_of(folder: Path, which: str) -> tuple[TunableModel, Source]:
    """The model of a run, or of an adapter that `fedtune export` wrote, and how its rows are read."""
    if (folder / "journal.db").exists():
        workspace, _, _ = installed(existing(folder), which)
        return workspace.tunable, workspace.recipe.data
    if not (folder / "fedtune.json").exists():
        raise FedtuneError(
            "M304",
            f"neither a run nor an adapter in '{folder}'",
            "the folder of a run, or one that fedtune export wrote",
            "correct the path",
        )
    tunable = loaded(folder)
    longest = min(tunable.base.context or LONGEST, LONGEST)
    known = {"source": "jsonl", "task": tunable.base.task, "max_length": longest}
    return tunable, SOURCES["jsonl"].model_validate(known)

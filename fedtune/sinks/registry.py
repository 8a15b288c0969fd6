"""Every sink that a recipe can name. A sink is registered by its place in this union, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from fedtune.events import Event, Noted, Progress, Sink
from fedtune.plugins import extended
from fedtune.settings import classes_by_tag
from fedtune.sinks.base import SinkSettings
from fedtune.sinks.csv import CSV
from fedtune.sinks.jsonl import JSONLines, jsonl_sink
from fedtune.sinks.trackers import MLflowTable, TensorBoardTable, WandBTable

SinkTable = Annotated[
    CSV | JSONLines | TensorBoardTable | WandBTable | MLflowTable, Field(discriminator="sink")
]
if not TYPE_CHECKING:
    SinkTable = extended(SinkTable, "sink", "sinks", SinkSettings)

SINKS: dict[str, type[SinkSettings]] = classes_by_tag(SinkTable, "sink")


def sink_of(folder: Path, chosen: Sequence[SinkSettings], *more: Callable[[Event], None]) -> Sink:
    """Tells the run's own events.jsonl first, then `more`, then the sinks of the recipe; progress, which
    depends on the clock, is told to `more` only.

    A sink of the recipe that fails is told nothing more, and the run goes on: it may have cost hours.
    """
    write = jsonl_sink(folder / "events.jsonl")
    opened = [(settings.sink, settings.open(folder)) for settings in chosen]

    def tell(event: Event) -> None:
        passing = isinstance(event, Progress)
        for sink in more if passing else (write, *more):
            sink(event)
        if passing:
            return
        for entry in list(opened):
            try:
                entry[1](event)
            except Exception as error:  # another package's code may raise anything
                opened.remove(entry)
                found = f"{type(error).__name__}: {str(error)[:160]}"
                tell(Noted(f"the sink '{entry[0]}' failed and is told nothing more ({found})"))

    return tell

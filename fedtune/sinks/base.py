"""Somewhere else that a run's events go, chosen by its recipe."""

from __future__ import annotations

from pathlib import Path

from fedtune.events import Sink
from fedtune.settings import Settings


class SinkSettings(Settings):
    """[[sinks]]: a sink's settings, beside the sink that they open. The union of these classes is the
    registry (registry.py)."""

    sink: str

    def open(self, folder: Path) -> Sink:
        """What is called with every event of the run in `folder`, from its start or from where it goes on."""
        raise NotImplementedError

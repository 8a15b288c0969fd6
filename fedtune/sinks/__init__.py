"""Where events go: a JSON lines file, the console, a table of figures, and what a recipe adds."""

from fedtune.sinks.base import SinkSettings
from fedtune.sinks.registry import SINKS, SinkTable, sink_of

__all__ = ["SINKS", "SinkSettings", "SinkTable", "sink_of"]

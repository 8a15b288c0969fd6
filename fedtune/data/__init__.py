"""Rows of data: read from a source, made into clients, split into what trains and what is held out. No
torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedtune.data.federation import Federation, Slice, histogram, load, load_slice
    from fedtune.data.rows import Rows

__all__ = ["Federation", "Rows", "Slice", "histogram", "load", "load_slice"]


def __getattr__(name: str) -> Any:
    """Import on first use: reading a recipe needs the settings only."""
    if name not in __all__:
        raise AttributeError(f"module 'fedtune.data' has no attribute '{name}'")
    from fedtune.data import federation

    return getattr(federation, name)

"""The base of every settings class: frozen, strict, no unknown keys. Settings stand next to what they configure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """One table of a recipe. Field descriptions become docs/recipe.md."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True)

    def conflicts(self, recipe: Any) -> Iterator[tuple[str, str, str]]:
        """Settings that cannot go together, each as found, expected, what to do: the recipe is refused (C104) with the first."""
        yield from ()

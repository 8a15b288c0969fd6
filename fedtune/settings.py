"""The base of every settings class: frozen, strict, no unknown keys. Settings stand next to what they configure."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """One table of a recipe. Field descriptions become docs/recipe.md."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True)

"""The recipes that fedtune carries."""

from __future__ import annotations

from importlib.resources import files

BUILT_IN = ("demo", "chat")  # names; the first is what runs where nobody says which


def text_of(name: str) -> str:
    return files("fedtune.recipes").joinpath(f"{name}.toml").read_text(encoding="utf-8")

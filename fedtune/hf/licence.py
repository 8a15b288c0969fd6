"""The licence of a base model, where its own files state it: nothing is asked over a network."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, metadata, packages_distributions
from pathlib import Path
from typing import Any

from fedtune.errors import FedtuneError
from fedtune.hf.config import PACKAGE, locate


def licence_of(name: str) -> str:
    """As the model's card says it (an SPDX identifier in lower case, by the hub's habit), or the package that
    carries the model; "" where neither says anything."""
    from huggingface_hub import try_to_load_from_cache

    try:
        place = Path(locate(name))
    except FedtuneError:  # the model is gone since
        return ""
    known: Any = place / "README.md" if place.is_dir() else None
    if known is None and name.count("/") == 1 and not name.startswith((".", "/", "~", PACKAGE)):
        known = try_to_load_from_cache(name, "README.md")
    stated = stated_in(Path(known)) if isinstance(known, (str, Path)) else ""
    if not stated and name.startswith(PACKAGE):
        stated = packaged(name.removeprefix(PACKAGE).partition("/")[0])
    return stated


def stated_in(card: Path) -> str:
    """What a model card's front matter says."""
    from huggingface_hub import metadata_load

    try:
        found = (metadata_load(card) or {}).get("license") if card.is_file() else None
    except Exception:  # YAML of other people
        return ""
    return found if isinstance(found, str) else ""


def packaged(package: str) -> str:
    """The licence of an installed package, by its metadata."""
    try:
        about = metadata(next(iter(packages_distributions().get(package, [package]))))
    except PackageNotFoundError:
        return ""
    stated = [about[key] for key in ("License-Expression", "License") if key in about]
    return next((str(text).split("\n")[0][:60].lower() for text in stated if text), "")

"""`path=value` on top of a parsed recipe, and which of the file's keys go when it chooses another class for a
table."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from fedtune.errors import FedtuneError
from fedtune.settings import Settings, leaves, tag_of, union_of


def apply_override(tree: dict[str, Any], override: str) -> tuple[str, ...]:
    """Set one dotted path, which is returned; the value is read as TOML, and as a bare string where it is
    none."""
    path, equals, raw = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise FedtuneError(
            "C103",
            f"--set '{override}'",
            "path=value such as rounds=3",
            "write the path, an equals sign and the value",
        )
    value = value_of(raw)
    node: Any = tree
    for depth, key in enumerate(keys):
        last = depth == len(keys) - 1
        if isinstance(node, list):
            if not key.isdigit() or int(key) >= len(node):
                raise FedtuneError(
                    "C103",
                    f"--set '{override}'",
                    f"a number below {len(node)} after '{'.'.join(keys[:depth])}'",
                    "count the tables from 0",
                )
            node[int(key)] = value if last else node[int(key)]
            node = node[int(key)]
        elif isinstance(node, dict):
            node[key] = value if last else node.get(key, {})
            node = node[key]
        else:
            raise FedtuneError(
                "C103", f"--set '{override}'", f"a table at '{'.'.join(keys[:depth])}'", "shorten the path"
            )
    return tuple(keys)


def value_of(text: str) -> Any:
    """A value as TOML reads it, or the text itself where it is none."""
    try:
        return tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        return text


def toml(value: Any) -> str:
    """A Python value as TOML writes it in one line.

    >>> toml({"step": "quantize", "bits": 4})
    '{step = "quantize", bits = 4}'
    """
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key} = {toml(below)}" for key, below in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(toml, value)) + "]"
    return json.dumps(str(value) if isinstance(value, Path) else value)


def drop_unused(
    tree: dict[str, Any], root: type[BaseModel], keys: Sequence[str], overridden: set[tuple[str, ...]]
) -> list[str]:
    """Where an override chose another class for a table, the file's keys that the class does not use go;
    returns their paths.

    What another override has set stays: if the class does not know it, that is an error.
    """
    table: Any = tree
    cls: type[BaseModel] | None = root
    for key in keys[:-1]:
        table = table.get(key, {}) if isinstance(table, dict) else {}
        cls = class_at(cls, key, table) if cls else None
    chooses = cls is not None and issubclass(cls, Settings) and keys[-1] in (tag_of(cls)[0], cls.selector)
    return (
        prune(table, cls, tuple(keys[:-1]), overridden) if cls and chooses and isinstance(table, dict) else []
    )


def class_at(cls: type[BaseModel], key: str, table: Any) -> type[BaseModel] | None:
    """The class that reads the table under a key; None where there is none, or its discriminator says nothing
    known."""
    if union := union_of(cls, key):
        return (
            union.classes.get(str(table.get(union.discriminator, union.default)))
            if isinstance(table, dict)
            else None
        )
    inner = leaves(cls.model_fields[key].annotation) if key in cls.model_fields else []
    return (
        inner[0]
        if len(inner) == 1 and isinstance(inner[0], type) and issubclass(inner[0], BaseModel)
        else None
    )


def prune(
    table: dict[str, Any], cls: type[BaseModel], path: tuple[str, ...], overridden: set[tuple[str, ...]]
) -> list[str]:
    """Take out what a class does not use, in its tables as well; returns the paths of what went."""
    idle = cls.unused(table) if issubclass(cls, Settings) else set()
    gone = [
        key
        for key in sorted((table.keys() - cls.model_fields.keys()) | (table.keys() & idle))
        if not any(over[: len(path) + 1] == (*path, key) for over in overridden)
    ]
    for key in gone:
        del table[key]
    dropped = [".".join((*path, key)) for key in gone]
    for key, below in table.items():
        chosen = class_at(cls, key, below)
        if chosen and isinstance(below, dict):
            dropped += prune(below, chosen, (*path, key), overridden)
    return dropped


def flat(tree: Mapping[str, Any], place: str = "") -> dict[str, Any]:
    """Dotted keys of a recipe; the tables of a list are counted from 0.

    >>> flat({"a": {"b": 1, "c": [2]}, "chain": [{"step": "sign"}]})
    {'a.b': 1, 'a.c': [2], 'chain.0.step': 'sign'}
    """
    found: dict[str, Any] = {}
    for key, value in tree.items():
        path = f"{place}{key}"
        if isinstance(value, Mapping):
            found |= flat(value, f"{path}.")
        elif isinstance(value, list) and value and all(isinstance(one, Mapping) for one in value):
            found |= flat({str(number): one for number, one in enumerate(value)}, f"{path}.")
        else:
            found[path] = value
    return found

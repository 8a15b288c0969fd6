"""Models are data here: a folder whose settings name code, its own or somebody's on a hub, is refused before
a library looks at it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers.utils.hub import cached_file

from fedtune.errors import FedtuneError

FILES = (
    "config.json",
    "tokenizer_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "generation_config.json",
)
NAMES = (
    "auto_map",
    "custom_pipelines",
    "custom_generate",
    "trust_remote_code",
)  # of what is loaded and run, or that it may be
KERNELS = (
    "_attn_implementation",
    "attn_implementation",
    "_attn_implementation_internal",
    "_experts_implementation",
    "kernel_config",
    "use_kernels",
)
LONGEST = 64 << 20  # bytes of such a file: those of added tokens are long


def refuse_code(place: str, known: dict[str, Any]) -> None:
    """Raises M301 where a model's settings would have code fetched or run."""
    for name in FILES:
        path = cached_file(
            place,
            name,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            **known,
        )
        if path is not None and (found := next(named(read(Path(path))), "")):
            raise FedtuneError(
                "M301",
                f"'{found}' in {name} of '{place}', which names code",
                "a model of an architecture that transformers has itself",
                "use such a model, or remove the key if transformers reads it without",
            )


def read(path: Path) -> Any:
    """A settings file; what cannot be read is said by whoever loads it."""
    try:
        return json.loads(path.read_bytes()) if path.stat().st_size <= LONGEST else None
    except (OSError, ValueError, RecursionError):
        return None


def named(tree: Any) -> Iterator[str]:
    """Keys, in any table inside, that name code."""
    if isinstance(tree, list):
        for below in tree:
            yield from named(below)
    if isinstance(tree, dict):
        for key, value in tree.items():
            if (key in NAMES and value) or (
                key in KERNELS and ((not isinstance(value, (str, type(None))) and value) or "/" in str(value))
            ):
                yield str(key)
            yield from named(value)

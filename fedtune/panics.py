"""Panics of libraries in Rust (tokenizers, safetensors) as errors like others.

pyo3 raises them as no Exception, so that whoever waits for failures does not see them; and a file of somebody
else's, such as a tokenizer whose pattern its library gives up on, is enough for one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from fedtune.errors import FedtuneError

RUST = "pyo3_runtime"  # the module of every library's own PanicException


@contextmanager
def panics_as_errors() -> Iterator[None]:
    """Raises M301 for a panic in the block."""
    try:
        yield
    except BaseException as error:
        if type(error).__module__ != RUST:
            raise
        first = next(iter(str(error).strip().splitlines()), "it said nothing")[:160]
        raise FedtuneError(
            "M301",
            f"a model or tokenizer on which its library stops ({first})",
            "files as transformers saves them",
            "choose another model",
        ) from None

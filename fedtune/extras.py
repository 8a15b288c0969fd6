"""Packages that only parts of fedtune need: a missing one is a sentence with the command that installs it."""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from typing import Any

from fedtune.errors import FedtuneError


def require(module: str, extra: str, what: str, code: str = "C107") -> Any:
    """An optional module, imported. Raises `code` where it is not installed.

    extra  of pyproject.toml, which brings it
    what   needs it, as the sentence begins
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        if find_spec(module.partition(".")[0]) is not None and not isinstance(error, ModuleNotFoundError):
            raise  # it is there, and broken: that is no missing package
        raise missing(module, extra, what, code) from None


def missing(module: str, extra: str, what: str, code: str = "C107") -> FedtuneError:
    package = module.partition(".")[0]
    return FedtuneError(
        code,
        sentence=f"{what} needs the package {package}, which is not installed",
        do=f"run: pip install 'fedtune[{extra}]'",
    )

"""Packages that only parts of fedtune need: a missing one is a sentence with the command that installs it."""

from __future__ import annotations

import importlib
from typing import Any

from fedtune.errors import FedtuneError


def require(module: str, extra: str, what: str, code: str = "C107") -> Any:
    """An optional module, imported. Raises `code` where its package is not installed; what a broken one
    raises stays as it is.

    extra  of pyproject.toml, which brings it
    what   needs it, as the sentence begins
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != module.partition(".")[0]:
            raise  # one of its own dependencies
        raise missing(module, extra, what, code) from None


def missing(module: str, extra: str, what: str, code: str = "C107") -> FedtuneError:
    package = module.partition(".")[0].replace("_", "-")
    return FedtuneError(
        code,
        sentence=f"{what} needs the package {package}, which is not installed",
        do=f"run: pip install 'fedtune[{extra}]'",
    )

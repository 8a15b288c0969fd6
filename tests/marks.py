"""Which cases of a test are tried every time, and which with -m thorough alone."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def mostly_thorough(cases: Iterable[Any], every_time: Collection[Any]) -> list[Any]:
    """Parameters for pytest.mark.parametrize: all but those `every_time` are thorough. A tuple is a value for
    each argument."""
    cases = list(cases)
    if unknown := [case for case in every_time if case not in cases]:
        raise ValueError(f"no case of this test, so that nothing of it is tried every time: {unknown}")
    return [
        pytest.param(
            *(case if isinstance(case, tuple) else (case,)),
            marks=() if case in every_time else pytest.mark.thorough,
        )
        for case in cases
    ]

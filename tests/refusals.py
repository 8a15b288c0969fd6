"""What a call is refused with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from fedtune.errors import FedtuneError


def code_of(call: Callable[..., object], *arguments: Any, **more: Any) -> str:
    """The code of the error that a call ends with."""
    with pytest.raises(FedtuneError) as caught:
        call(*arguments, **more)
    return caught.value.code

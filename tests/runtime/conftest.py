"""Adapters to merge."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.runtime.merging import CONFIGS, stock


@pytest.fixture(scope="module")
def shelf(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("shelf")
    return [stock(tiny_llama, root / f"{number}", number, **config) for number, config in enumerate(CONFIGS)]

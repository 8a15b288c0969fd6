"""Every recorded recipe still ends with its bytes (on a processor without recorded bytes: with the same numbers);
those under which methods keep the laws are compared in test_laws.py, which runs them anyway."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conformance.states import FILE, MORE, RECIPES, end_of, require_known


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def test_every_recipe_is_recorded() -> None:
    assert set(json.loads(FILE.read_text())["ends"]) == set(RECIPES) and len(RECIPES) >= 40


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] if name.startswith("kind ") else []) for name in MORE],
)  # kinds have laws of their own in tests/model
def test_a_recipe_ends_with_its_bytes(name: str, models: Path, data: Path, tmp_path: Path) -> None:
    require_known(name, end_of(name, models, data, tmp_path))

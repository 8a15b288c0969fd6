"""Generated files are fresh, and a stale one is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import regen


@pytest.mark.parametrize("name", regen.GENERATORS)
def test_generated_files_are_fresh(name: str) -> None:
    assert not regen.stale([name]), f"run: python -m tests.regen {name}"


def test_a_stale_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regen, "ROOT", tmp_path)
    monkeypatch.setattr(regen, "GENERATORS", {"one": lambda: {"docs/a.md": "new\n", "docs/b.md": "same\n"}})
    regen.write({"docs/a.md": "old\n", "docs/b.md": "same\n"})
    assert regen.stale() == {"docs/a.md": "new\n"}
    regen.write(regen.stale())
    assert regen.stale() == {}

"""Generated files are fresh, and a stale one is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import regen
from tests.regen.results import drifts


@pytest.mark.thorough
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


def test_figures_by_round_are_means_over_seeds_of_what_was_recorded() -> None:
    """Drifts of 10 and 20 % are 15 %; a run that is one round longer stands alone there; rules without
    figures have no row."""
    table = {
        "rows": {
            "mean": {"1": {"rounds": 2}},
            "flexlora": {
                "1": {"by_round": [{"drift": 0.1, "error": 0.0}, {"drift": 0.3, "error": 0.0}]},
                "2": {"by_round": [{"drift": 0.2, "error": 0.0}]},
                "3": {"rounds": 2},
            },
            "clipped": {"1": {"by_round": [{"cut": 0.5}]}},
        }
    }
    lines = drifts(table)
    assert [line for line in lines if line.startswith("| ")] == [
        "| | seeds | 1 | 2 |",
        "| flexlora | 2 | 15.0 | 30.0 |",
        "| | seeds | 1 | 2 |",
        "| flexlora | 2 | 0.0 | 0.0 |",
    ]
    assert drifts({"rows": {"mean": {"1": {}}}}) == []

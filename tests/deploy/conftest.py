"""Rows, and short waits, for the tests of coordinators and sites."""

from __future__ import annotations

import pytest

from fedtune.deploy import transport


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looks that take seconds at real sites take hundredths."""
    monkeypatch.setattr(transport, "AGAIN", 0.3)
    monkeypatch.setattr(transport, "PAUSE", 0.02)
    monkeypatch.setattr("fedtune.flower.nodes.LOOK_SECONDS", 0.02)
    monkeypatch.setattr("fedtune.flower.nodes.GREETING_SECONDS", 1.0)

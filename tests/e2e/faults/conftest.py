"""Slow by nature: every fault is a run of real processes. Those that are not marked `slow` belong to the
default tests."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests import small
from tests.e2e.deploying import MEMORY, Deployment, deployed, local
from tests.e2e.test_flower import journal


@pytest.fixture(scope="package")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.write_rows(tmp_path_factory.mktemp("rows"))


@pytest.fixture
def federation(tmp_path: Path) -> Iterator[Deployment]:
    with deployed(tmp_path) as made:
        yield made
        print(made.logs())  # pytest shows it where a test failed


class Oracle:
    """Undisturbed runs in this process, each played once."""

    def __init__(self, root: Path, model: Path, data: Path) -> None:
        self.root, self.model, self.data = root, model, data
        self.played: dict[str, Any] = {}

    def __call__(self, **changes: Any) -> tuple[Any, dict[str, Any]]:
        key = repr(sorted(changes.items()))
        if key not in self.played:
            self.played[key] = local(self.root / f"run-{len(self.played)}", self.model, self.data, **changes)
        return self.played[key]

    def recipe(self, federation: Deployment, name: str = "run", **changes: Any) -> Path:
        return federation.recipe(name, self.model, self.data, **{**MEMORY, **changes})

    def same(self, federation: Deployment, name: str = "run", **changes: Any) -> None:
        """The bytes and the journal of the undisturbed run; every update once in the exchange's book; no
        traceback for any user."""
        alone, result = self(**{**MEMORY, **changes})
        folder = federation.folder(name)
        assert folder.read_json("result.json")["state_sha256"] == result["state_sha256"]
        assert journal(folder) == journal(alone)
        assert counts(federation) == result["rounds"] * result["clients"]
        for who in ("server", "site-a", "site-b", "site-c"):
            assert "Traceback" not in federation.said(who)


def counts(federation: Deployment) -> int:
    """Updates that the exchange gave a receipt for; none may be there twice."""
    with closing(
        sqlite3.connect(federation.root / "runs" / ".coordinator" / "exchange" / "book.db")
    ) as ledger:
        rows = ledger.execute("SELECT run, round, verb, client FROM accepted").fetchall()
    assert len(set(rows)) == len(rows)
    return len(rows)


@pytest.fixture(scope="package")
def oracle(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path, data: Path) -> Oracle:
    return Oracle(tmp_path_factory.mktemp("oracle"), tiny_bert, data)

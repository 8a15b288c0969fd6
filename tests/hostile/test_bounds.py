"""A hostile site's numbers: by default none of them owns the mean, ends the run or steers it. The site is
left out and named; honest sites' bytes stay."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedtune.deploy import transport
from fedtune.deploy.coordinator_run import with_reported_ranks
from fedtune.deploy.declared import declared, heaviest
from tests import small
from tests.deploy.conducting import notes, outcomes
from tests.deploy.inside import SITES, FakeGrid, Inside, inside
from tests.hostile.site import Liar, Lie, times
from tests.marks import mostly_thorough

KSEED = {"method": {"type": "fedkseed", "size": 64, "estimator": "spsa", "steps": 2, "batch": 4, "lr": 1e-3}}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "AGAIN", 0.3)
    monkeypatch.setattr(transport, "PAUSE", 0.02)
    monkeypatch.setattr("fedtune.flower.nodes.LOOK_SECONDS", 0.02)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.write_rows(tmp_path_factory.mktemp("rows"))


def federation(root: Path, model: Path, rows: Path, **changes: Any) -> Any:
    """Real sites: each has rows of its own, as it says in its greeting."""
    plain = {
        "deploy__data": "sites",
        "deploy__test": str(rows),
        "data__labels": sorted(small.WORDS),
        "rounds": 2,
    }
    return inside(root, model, rows, **plain, **changes)


def conduct(made: Inside, rows: Path, model: Path, lie: Lie, **says: Any) -> dict[tuple[int, int], str]:
    own = {"data": str(rows), "model": str(model)}
    liar = made.worker("site-b", Liar, **own)
    assert isinstance(liar, Liar)
    liar.lie, liar.says = lie, says  # type: ignore[method-assign]
    made.conduct(FakeGrid({101: made.worker("site-a", **own), 102: liar, 103: made.worker("site-c", **own)}))
    return outcomes(made.folder)


LIES: dict[str, tuple[Lie, str]] = {
    "a weight of a hundred million": (times(1, weight=1e6), "W606"),
    "one row more than it declared": (lambda u: times(1, weight=(121 + 1e-3) / u.weight)(u), "W606"),
    "values near the end of float32": (times(3e37), "W607"),
    "a large but finite answer": (times(1e6), "W606"),
    "a loss of a thousand million": (times(1, figures=1e13), "W607"),
}


@pytest.mark.parametrize("what", mostly_thorough(sorted(LIES), ["a weight of a hundred million"]))
def test_a_liar_is_left_out_and_named_and_nobody_else_is_touched(
    what: str, tiny_bert: Path, rows: Path, tmp_path: Path
) -> None:
    lie, code = LIES[what]
    with federation(tmp_path / "lied", tiny_bert, rows) as made:
        got = conduct(made, rows, tiny_bert, lie)
        assert {got[1, 0], got[1, 2], got[2, 0], got[2, 2]} == {"ok"} and got[1, 1] == got[2, 1] == code
        assert all("site-b" in note for note in notes(made.folder) if code in note) and notes(made.folder)
        lied = made.folder.read_json("result.json")["state_sha256"]
    with federation(tmp_path / "alone", tiny_bert, rows, deploy__deadline=2.0) as made:
        own = {"data": str(rows), "model": str(tiny_bert)}
        made.conduct(FakeGrid({101: made.worker("site-a", **own), 103: made.worker("site-c", **own)}))
        assert made.folder.read_json("result.json")["state_sha256"] == lied


@pytest.mark.thorough
def test_a_loss_of_one_site_ends_nobodys_run(tiny_bert: Path, rows: Path, tmp_path: Path) -> None:
    """FedKSeed compares a round's loss with the first: of the median client."""
    with federation(tmp_path, tiny_bert, rows, **KSEED) as made:
        got = conduct(made, rows, tiny_bert, times(1, figures=500.0))
        assert made.folder.read_json("result.json")["rounds"] == 2 and got[2, 0] == got[2, 2] == "ok"


@pytest.mark.thorough
def test_the_memory_that_one_site_says_ends_nobodys_run(tiny_bert: Path, rows: Path, tmp_path: Path) -> None:
    auto = {
        "method__lora_rank_by_client": "auto",
        "method__adapter__rank": 4,
        "aggregate": {"rule": "hetlora"},
    }
    with federation(tmp_path, tiny_bert, rows, **auto) as made:
        said: list[str] = []

        class Nodes:
            reports = {name: {"memory": 1 if name == "site-b" else 1 << 34} for name in SITES}  # noqa: RUF012
            tell = staticmethod(said.append)

        recipe = with_reported_ranks(made.recipe, Nodes())  # type: ignore[arg-type]
        assert (
            recipe.method.lora_rank_by_client == (4, 1, 4) and len(said) == 1 and "'site-b' says" in said[0]
        )


def recipes(model: Path, rows: Path) -> Iterator[Any]:
    for task in ("classify", "causal-lm"):
        for weight in ("rows", "tokens", "equal", "loss-speed"):
            yield small.recipe(model, rows, data__task=task, method__weight=weight, partition__by="iid")


def test_an_honest_answer_weighs_no_more_than_was_declared(tiny_bert: Path, tmp_path: Path) -> None:
    """Rows are counted without being read: as lines, by a table's own count, otherwise a row a byte."""
    rows = small.write_rows(tmp_path)
    assert declared(str(rows)) == {"rows": 121, "bytes": rows.stat().st_size} and declared(
        ""
    ) == {} == declared(str(tmp_path / "none"))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.json").write_text(json.dumps(small.rows(9)))
    assert declared(str(tmp_path / "folder"))["rows"] >= 9
    report = declared(str(rows))
    for recipe in recipes(tiny_bert, rows):
        most = heaviest(recipe, report, "train")
        assert (
            most == {"rows": 121.0, "tokens": most, "equal": 1.0, "loss-speed": 2718.0}[recipe.method.weight]
            or recipe.data.task == "causal-lm"
        )
        assert most >= {"rows": 120, "tokens": 120 * 9, "equal": 1, "loss-speed": 2718}[recipe.method.weight]
    assert (
        heaviest(recipe, {}, "train") == float("inf") == heaviest(recipe, {"rows": -1, "bytes": "x"}, "train")
    )

"""Anything that goes wrong at one client is that client's failure, on every engine; scores that cannot be
made are null, and the run has a result."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from fedtune.disk import json_text
from fedtune.errors import ClientFailed, FedtuneError, Paused
from fedtune.events import ClientLeftOut, Noted
from fedtune.flower import server_app
from fedtune.methods.fedpeft import FedPEFT
from fedtune.model import score as scores
from fedtune.model.score import score
from fedtune.runtime.failures import failure_of
from fedtune.types import Client, Round
from tests import small
from tests.e2e.test_flower_grid import FakeGrid
from tests.marks import mostly_thorough

COMPARED = {"evaluate": {"local": True, "centralised": True, "base": True, "clients": True}}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return small.write_rows(tmp_path)


ERRORS = [
    RuntimeError("a broken kernel"),
    KeyError("label"),
    MemoryError(),
    FedtuneError("M309", "x", "y", "z"),
]


@pytest.mark.parametrize("error", mostly_thorough(ERRORS, ERRORS[:1]))
def test_an_exception_at_one_client_leaves_it_out_on_every_engine(
    error: Exception, tiny_bert: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = FedPEFT.train

    def train(self: FedPEFT, client: Client, given: Any, now: Round) -> Any:
        if (client.id, now.number) == (2, 2):
            raise error
        return honest(self, client, given, now)

    monkeypatch.setattr(FedPEFT, "train", train)
    recipe = small.recipe(tiny_bert, data)
    folder, here, told = small.play(recipe, tmp_path / "local")
    grid = FakeGrid({90 + part: part for part in range(4)})

    def carry(link: Any, workspace: Any) -> Any:
        return server_app.flower_transport(grid, recipe, server_app.find_nodes(grid, 4, 5), seconds=5)

    _, there, told_too = small.play(recipe, tmp_path / "flower", carry=carry)
    code = error.code if isinstance(error, FedtuneError) else "R411"
    for events in (told, told_too):
        assert [(e.round, e.name, e.code) for e in events if isinstance(e, ClientLeftOut)] == [
            (2, "client-2", code)
        ]
    assert here["state_sha256"] == there["state_sha256"] and here["left_out"] == there["left_out"] == 1
    if code == "R411":
        assert type(error).__name__ in (folder.path / "errors" / "client-2.txt").read_text()


def test_what_is_about_the_whole_run_is_raised_again() -> None:
    with pytest.raises(Paused):
        failure_of(Paused("R409", "x", "y", "z"), "a")
    known = ClientFailed("W607", "x", "y", "z")
    assert failure_of(known, "a") is known


def test_comparisons_that_fail_are_null_and_the_run_ends(
    tiny_bert: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def alone(self: Any, *args: Any) -> None:
        raise ClientFailed("W607", "a loss of nan", "a finite number", "lower it")

    monkeypatch.setattr(FedPEFT, "alone", alone)
    folder, result, told = small.play(small.recipe(tiny_bert, data, **COMPARED), tmp_path)
    assert (
        result["local"] is None
        and result["centralised"] is None
        and result["federated"] > 0
        and result["base"] > 0
    )
    assert (folder.adapter / "adapter_config.json").exists()
    assert [e.text.partition(".")[0] for e in told if isinstance(e, Noted)] == [
        "not scored: centralised",
        *(f"not scored: local:{n}" for n in range(4)),
    ]
    monkeypatch.undo()
    assert json.loads((folder.path / "result.json").read_text()) == json.loads(json_text(result))


def test_scores_of_nan_are_no_scores(
    workspace: Any, tiny_bert: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        scores,
        "summed_loss",
        lambda tunable, batch, honest=scores.summed_loss: (
            honest(tunable, batch)[0] * math.nan,
            *honest(tunable, batch)[1:],
        ),
    )
    from fedtune.model.tunable import attach
    from tests.tables import adapter_of

    tunable = attach(workspace.base("encoder"), adapter_of(kind="head"), 0)
    with pytest.raises(FedtuneError, match=r"W607.*a loss of nan on the 6 examples to score"):
        score(tunable, workspace.encoded("encoder"))
    folder, result, _ = small.play(
        small.recipe(tiny_bert, data, evaluate__every=1, evaluate__base=True, evaluate__clients=True),
        tmp_path,
    )
    assert (
        result["federated"] is None
        and result["base"] is None
        and set(result["phases"]["clients_metric"].values()) == {None}
    )
    for name in ("result.json", "events.jsonl"):
        path = folder.path / name
        for line in (
            path.read_text().splitlines()
            if name.endswith("l") and path.exists()
            else [path.read_text()]
            if path.exists()
            else []
        ):
            json.loads(line, parse_constant=lambda word: pytest.fail(word))


def test_json_knows_no_nan() -> None:
    content = {"a": math.nan, "b": [math.inf, 1.5], "c": {"d": -math.inf}, "e": (1, True, None)}
    assert json_text(content) == '{"a": null, "b": [null, 1.5], "c": {"d": null}, "e": [1, true, null]}'


@pytest.mark.thorough
def test_a_client_whose_texts_are_all_cut_is_left_out_by_name_and_checked(
    tiny_llama: Path, tmp_path: Path
) -> None:
    words = "the red fox runs over the green hill"
    rows = [{"prompt": words, "response": words, "site": f"s{n % 3}"} for n in range(30)] + [
        {"prompt": (words + " ") * 9, "response": "x", "site": "bad"}
    ] * 6
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = {
        "data__task": "instruct",
        "data__max_length": 60,
        "partition": {"by": "column", "column": "site", "clients": 4},
        **COMPARED,
    }
    for number, method in enumerate(
        ({}, {"method": {"type": "fedkseed", "steps": 2, "size": 64}}, {"method": {"type": "sfprompt"}})
    ):
        _, result, told = small.play(
            small.recipe(tiny_llama, path, rounds=1, **changes, **method), tmp_path / str(number)
        )
        assert [(e.name, e.code) for e in told if isinstance(e, ClientLeftOut)] == [
            ("bad", "D205")
        ] and result["rounds"] == 1

"""Anything that goes wrong at one client is that client's failure, on every engine; scores that cannot be
made are null, and the run has a result."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from fedtune.disk import json_text
from fedtune.errors import CATALOGUE, ClientFailed, FedtuneError, Paused, Refused
from fedtune.events import ClientLeftOut, Noted
from fedtune.flower import server_app
from fedtune.methods.fedpeft import FedPEFT
from fedtune.model import score as scores
from fedtune.model.score import score
from fedtune.runtime.failures import failure_of, heard, numbered, write_traceback
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


def test_a_mistake_keeps_its_words_and_what_nobody_foresaw_gets_some(tmp_path: Path) -> None:
    known = failure_of(FedtuneError("D205", "x", "y", "z"), "a", tmp_path)
    assert isinstance(known, ClientFailed) and str(known) == str(FedtuneError("D205", "x", "y", "z"))
    assert failure_of(Refused("W607", "x", "y", "z"), "a").code == "W607"
    assert not list(tmp_path.iterdir())
    long = "b" * 200
    odd = failure_of(RuntimeError(f" {long}\nsecond line"), "a/b", tmp_path)
    assert isinstance(odd, ClientFailed) and odd.code == "R411"
    assert f"of client 'a/b' stopped with RuntimeError ({'b' * 160})" in str(odd)
    assert str(tmp_path / "a_b.txt") in str(odd) and "second line" not in str(odd)
    silent = failure_of(MemoryError(), "a")
    assert "stopped with MemoryError" in str(silent) and "(" not in str(silent)
    assert "see the client's log" in str(silent)


def test_tracebacks_of_a_client_are_in_one_file_of_its_own(tmp_path: Path) -> None:
    logs = tmp_path / "deep" / "logs"
    for word in ("first", "second"):
        path = write_traceback(ValueError(word), "a b/ü", logs)
        assert path == logs / "a_b__.txt"
    assert (logs / "a_b__.txt").read_text() == "ValueError: first\n\nValueError: second\n\n"
    assert write_traceback(ValueError("x"), "n" * 99, logs) == logs / f"{'n' * 80}.txt"
    assert write_traceback(ValueError("x"), "", logs) == logs / "client.txt"
    assert write_traceback(ValueError("x"), "a", None) is None
    assert write_traceback(ValueError("x"), "a", logs / "client.txt") is None  # a file, where a folder is due


def test_what_leaves_a_site_is_a_code_and_a_number() -> None:
    error = FedtuneError("D205", "row 7 of secret.csv", "a label", "z")
    sent, kept = numbered(error)
    assert sent.keys() == {"code", "number"} and sent["code"] == "D205" and len(sent["number"]) == 8
    assert kept == f"{error} (number {sent['number']})" and numbered(error)[0]["number"] != sent["number"]
    known = heard(sent, "north")
    assert isinstance(known, ClientFailed) and known.code == "D205"
    assert f"at 'north', number {sent['number']}: {CATALOGUE['D205'].rstrip('.')}" in str(known)
    assert "ask the operator of 'north'" in str(known)
    for odd in ({"code": "Z999", "number": "12345678"}, {"number": "<b>"}, {}):
        other = heard(odd, "north")
        assert isinstance(other, ClientFailed) and other.code == "F503" and "'north'" in str(other)
        assert (", number 12345678" in str(other)) == ("code" in odd) and "<b>" not in str(other)
    assert "number" not in str(heard({"code": "D205", "number": "xyz"}, "north")).partition(":")[2]


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

"""What a client trains by, what it reads and which rows it takes end with the same bytes on every carrier: over
Flower's messages, with a run that is stopped in its second round and taken up by new processes, as in one
process. A newcomer to one of the unions is enrolled by a line here."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from fedtune.events import ClientDone, Event
from fedtune.model.input_changes import INPUT_CHANGES
from fedtune.model.likelihood import base_alone
from fedtune.model.objectives import OBJECTIVES, Preference
from fedtune.runtime.folder import create
from fedtune.runtime.workspace import how_to_encode
from fedtune.selection import SELECTIONS, Holder
from tests import small
from tests.deploy import inside as sites
from tests.marks import mostly_thorough

client_app = pytest.importorskip("fedtune.flower.client_app")
server_app = pytest.importorskip("fedtune.flower.server_app")

TOKENS = 4  # of the model's own answers
SELECT: dict[str, list[dict[str, Any]]] = {  # by -> [[select]]
    "pvi": [{"by": "pvi", "drop": 0.25}],
    "s3ft": [{"by": "s3ft", "tokens": TOKENS}],
    "group": [{"by": "group", "evenness": 0.5}],
}
TRAIN: dict[str, dict[str, Any]] = {  # what it is, a dash, its name -> [method.train]
    "input-neftune": {"inputs": [{"input": "neftune"}]},
    "input-masked-thought": {"inputs": [{"input": "masked-thought", "token": "random"}]},
    "loss-cross-entropy": {"objective": {"loss": "cross-entropy", "smoothing": 0.1}},
    "loss-focal": {"objective": {"loss": "focal"}},
    "loss-balanced": {"objective": {"loss": "balanced"}},
    "loss-dft": {"objective": {"loss": "dft"}},
    "loss-asft": {"objective": {"loss": "asft"}},
    "uds": {"uds": {"keep": 0.5}},
}
COUNTED = {"data__template": "auto", "data__task": "classify", "data__text": "prompt", "data__label": "kind"}
CHOICES: dict[str, dict[str, Any]] = {
    **{f"select-{by}": {"select": tables} for by, tables in SELECT.items()},
    **{
        name: {f"method__train__{key}": value for key, value in table.items()}
        for name, table in TRAIN.items()
    },
    "loss-logit-adjusted": {"method__train__objective": {"loss": "logit-adjusted"}, **COUNTED},
    "select-pvi-in-order": {
        "select": [{"by": "pvi", "drop": 0.0, "order": True}],
        "method__train__curriculum": {"start": 0.2, "until": 0.9},
    },
    "select-s3ft-in-other-words": {
        "select": [{"by": "s3ft", "tokens": TOKENS, "paraphrase": "again: {response}"}],
    },
    "shared": {"data__share": 0.3},
    "all": {  # one after the other, and together
        "select": [table for tables in SELECT.values() for table in tables],
        "method__train__inputs": [table for one in TRAIN.values() for table in one.get("inputs", [])],
        "method__train__uds": {"keep": 0.5},
        "data__share": 0.3,
    },
}


def enrolled(sort: str) -> set[str]:
    """Names of a sort, without what one of them may be in addition."""
    found = {name.removeprefix(f"{sort}-") for name in CHOICES if name.startswith(f"{sort}-")}
    return {re.split("-in-", name)[0] for name in found}


def test_every_choice_is_enrolled() -> None:
    """Losses on pairs of responses have tests/runtime/test_preference_runs.py."""
    assert enrolled("select") == SELECTIONS.keys()
    assert enrolled("input") == INPUT_CHANGES.keys()
    pairs = {name for name, one in OBJECTIVES.items() if issubclass(one, Preference)}
    assert enrolled("loss") == OBJECTIVES.keys() - pairs


@pytest.fixture(scope="module")
def rows(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions with answers, half of them what the base model itself would say, but for case; one kind of them
    is rare. Beside them four that all clients share."""
    from fedtune.selection.s3ft import own_answers

    folder = tmp_path_factory.mktemp("rows")
    made = [
        {"prompt": row["text"], "response": f"{row['label']} it is", "kind": "ab"[not number % 8]}
        for number, row in enumerate(small.rows(48))
    ]

    def write() -> None:
        for name, some in (("rows", made), ("shared", made[:4])):
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))

    write()
    workspace, _ = small.workspace_of(recipe(tiny_llama, folder, {}))
    how = {**how_to_encode(workspace.recipe.data), "alive": lambda: None}
    with base_alone(workspace.tunable) as base:
        said = own_answers(made, Holder(0, 3, base, how), TOKENS)
    for row, one in list(zip(made, said, strict=True))[::2]:
        row["response"] = one.upper()
    write()
    return folder


def changed(rows: Path, changes: dict[str, Any]) -> dict[str, Any]:
    """Changes to the small recipe. One client of two a round: the second looks at its rows when the model is
    tuned already."""
    same = {
        "rounds": 2, "data__task": "instruct", "data__max_length": 40, "data__template": "plain",
        "data__group": "kind", "partition__clients": 2, "sampling": {"count": 1}, "method__train__steps": 1,
        "data__test_share": 0.1,
    }  # fmt: skip
    shared = {"data__shared": str(rows / "shared.jsonl")} if "data__share" in changes else {}
    return {**same, **shared, **changes}


def recipe(model: Path, rows: Path, changes: dict[str, Any]) -> Any:
    return small.recipe(model, rows / "rows.jsonl", **changed(rows, changes))


@pytest.mark.parametrize("name", mostly_thorough(CHOICES, ["all", "uds", "loss-asft", "select-s3ft"]))
def test_flowers_messages_and_a_run_taken_up_again_end_with_the_bytes_of_one_process(
    name: str, tiny_llama: Path, rows: Path, tmp_path: Path
) -> None:
    from tests.e2e.test_flower_grid import FakeGrid

    made = recipe(tiny_llama, rows, CHOICES[name])
    local, result, _ = small.play(made, tmp_path / "local")
    folder = create(tmp_path, "", "run")

    def stop(event: Event) -> None:
        if isinstance(event, ClientDone) and event.round == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        server_app.serve(FakeGrid({5: 1, 6: 0}), made, folder, stop)
    client_app._worlds.clear()  # as new processes have it: rows are looked at, and chosen, once more
    again = server_app.serve(FakeGrid({7: 0, 4: 1}), made, folder, lambda event: None)
    assert again["state_sha256"] == result["state_sha256"] and again["left_out"] == result["left_out"] == 0
    assert folder.state(2).read_bytes() == local.state(2).read_bytes()


def test_each_choice_is_another_run(tiny_llama: Path, rows: Path, tmp_path: Path) -> None:
    """What the law above compares would be equal for choices that nobody makes, too. (This model paraphrases
    nothing that a judge would accept, and classes are another task.)"""
    names = [name for name in CHOICES if name not in ("loss-logit-adjusted", "select-s3ft-in-other-words")]
    plain: dict[str, Any] = {"partition__clients": 1, "rounds": 1, "method__train__steps": 2}
    ends = {
        name: small.play(recipe(tiny_llama, rows, {**CHOICES.get(name, {}), **plain}), tmp_path / name)[1]
        for name in ["plain", *names]
    }
    assert len({one["state_sha256"] for one in ends.values()}) == len(ends)


@pytest.mark.thorough
def test_workers_of_real_sites_end_with_the_bytes_of_one_process(
    tiny_llama: Path, rows: Path, tmp_path: Path
) -> None:
    """All choices at once, but for rows that sites share, of which each has a copy of its own."""
    together = {key: value for key, value in CHOICES["all"].items() if key != "data__share"}
    enough = {"partition__clients": 3, "sampling": {"count": 2}, "method__train__steps": 4}  # for a policy
    made = changed(rows, {**together, **enough})
    want = small.play(small.recipe(tiny_llama, rows / "rows.jsonl", **made), tmp_path / "local")[1]
    with sites.inside(tmp_path, tiny_llama, rows / "rows.jsonl", **made) as run:
        run.conduct(sites.FakeGrid(run.workers()))
        found = run.folder.read_json("result.json")
    assert found["state_sha256"] == want["state_sha256"] and found["left_out"] == want["left_out"] == 0

"""What a client makes of its rows is its formula, the same whatever was trained before; nothing where it is idle;
a client that is left nothing is left out by its name."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedtune.config import method_of
from fedtune.errors import ClientFailed, FedtuneError
from fedtune.events import ClientLeftOut, Noted
from fedtune.metrics.answer import Answer
from fedtune.model.encode import encode
from fedtune.runtime.exposure import exposure
from fedtune.runtime.workspace import Workspace, how_to_encode
from fedtune.selection import SELECTIONS, Holder, selected
from fedtune.selection.group import Group, places
from fedtune.selection.pvi import Pvi, unprompted
from fedtune.selection.s3ft import S3ft, answered
from fedtune.transforms import build
from tests import small

IDLE: dict[str, dict[str, Any]] = {"pvi": {"drop": 0.0}, "s3ft": {"tokens": 0}, "group": {"evenness": 0.0}}
SAID = ["the", "fox", "runs", "song", "rain", "falls", "piano", "a", "dog", "sleeps"]


def rows() -> list[dict[str, Any]]:
    made = []
    for number in range(24):
        words = [SAID[(number * 3 + step) % len(SAID)] for step in range(2 + number % 4)]
        made.append(
            {
                "prompt": f"say {words[0]} {'now ' * (number % 3)}",
                "response": " ".join(words),
                "site": f"site-{number % 2}",
                "kind": "rare" if number % 8 == 0 else "often",
            }
        )
    return made


def write(folder: Path, made: list[dict[str, Any]]) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("data"), rows())


def recipe(model: Path, data: Path, **changes: Any) -> Any:
    return small.recipe(
        model,
        data,
        **{
            "rounds": 2,
            "data__task": "instruct",
            "data__max_length": 40,
            "data__template": "plain",
            "partition": {"by": "column", "column": "site"},
            **changes,
        },
    )


@pytest.fixture(scope="module")
def workspace(tiny_llama: Path, data: Path) -> Workspace:
    return small.workspace_of(recipe(tiny_llama, data, select=[{"by": "pvi", "drop": 0.25}]))[0]


def how(workspace: Workspace) -> dict[str, Any]:
    return {**how_to_encode(workspace.recipe.data), "alive": lambda: None}


def test_every_selection_is_enrolled() -> None:
    assert IDLE.keys() == SELECTIONS.keys()


def by_hand(workspace: Workspace, row: dict[str, Any]) -> dict[int, float]:
    """Place of a token in the response -> its log2 probability: one row through the network alone, in
    float64."""
    one = encode([row], workspace.base, **how(workspace))[0]
    ids = one["input_ids"]
    with torch.no_grad():
        said = workspace.base.net(input_ids=torch.from_numpy(ids).long()[None])
    logits = said.logits[0].double().numpy()
    start = int(np.flatnonzero(one["labels"] != -100)[0])
    found = {}
    for place in range(max(start, 1), len(ids)):
        z = logits[place - 1]
        found[place - start] = float((z[ids[place]] - np.log(np.exp(z).sum())) / np.log(2))
    return found


def test_pvi_is_its_formula_whatever_was_trained(workspace: Workspace) -> None:
    """The rows that a client has left are those of the largest PVI; the adapter has no say, and stays."""
    tunable, own = workspace.tunable, workspace.federation.clients[0].train
    for value in tunable.named.values():
        torch.nn.init.normal_(value, generator=torch.Generator().manual_seed(1))
    before = tunable.read()
    kept = workspace.selected(workspace.federation.clients[0])
    for name, value in tunable.read().items():
        assert np.array_equal(value, before[name])
    tunable.check_live()
    from fedtune.model.likelihood import base_alone

    with base_alone(tunable) as base:
        want = []
        for row in own:
            told, blind = by_hand(workspace, row), by_hand(workspace, unprompted(row))
            want.append(sum(told[place] - blind[place] for place in told.keys() & blind.keys()))
        from fedtune.selection.pvi import pvi

        found = pvi(own, Holder(0, 3, base, how(workspace)))
    np.testing.assert_allclose(found, want, atol=1e-3)
    out = set(np.argsort(want)[: int(0.25 * len(own))].tolist())
    assert kept == [row for number, row in enumerate(own) if number not in out] and len(out) > 1


def test_nothing_is_said_before_a_response_without_its_prompt() -> None:
    chat = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    assert [m["content"] for m in unprompted(chat)["messages"]] == ["", "b"]
    assert [m["content"] for m in answered(chat, "c")["messages"]] == ["a", "c"]
    assert answered({"prompt": "x", "response": " gold"}, "own") == {"prompt": "x", "response": " own"}


def test_groups_get_even_shares() -> None:
    assert places({"a": 7, "b": 1}, 1.0) == {"a": 4, "b": 4}
    assert places({"a": 64, "b": 4}, 0.5) == {"a": 54, "b": 14}  # 8 : 2 of 68
    assert places({"a": 98, "b": 1, "c": 1}, 0.0) == {"a": 98, "b": 1, "c": 1}
    own = [{"text": str(n), "group": "a" if n % 4 else "b"} for n in range(40)]
    made, said = Group().choose(own, Holder(2, 3, None, {}))
    assert Counter(row["group"] for row in made) == {"a": 20, "b": 20} and "a 30 > 20, b 10 > 20" in said
    assert Counter(Counter(row["text"] for row in made).values()) == {1: 20, 2: 10}
    assert made == Group().choose(own, Holder(2, 3, None, {}))[0]
    assert made != Group().choose(own, Holder(3, 3, None, {}))[0]


def test_idle_is_the_plain_run_to_the_bit(tiny_llama: Path, data: Path, tmp_path: Path) -> None:
    more = {"data__group": "kind"}
    plain = small.play(recipe(tiny_llama, data), tmp_path / "plain")[1]["state_sha256"]
    idle = [{"by": by, **table} for by, table in IDLE.items()]
    found = small.play(recipe(tiny_llama, data, select=idle, **more), tmp_path / "idle")[1]
    assert found["state_sha256"] == plain
    awake = [{"by": "group"}, {"by": "pvi", "drop": 0.3}]
    _, result, events = small.play(recipe(tiny_llama, data, select=awake, **more), tmp_path / "awake")
    assert result["state_sha256"] != plain and result["left_out"] == 0
    said = [event.text for event in events if isinstance(event, Noted) and "[[select]]" in event.text]
    assert len(said) == 4 and all("client site-" in one for one in said)  # once a client and selection


def test_own_answers_stand_in_where_the_judge_accepts_them(
    workspace: Workspace, tiny_llama: Path, tmp_path: Path
) -> None:
    """A client none of whose answers is accepted is left out by name, and the others go on."""
    from fedtune.model.likelihood import base_alone
    from fedtune.selection.s3ft import own_answers

    with base_alone(workspace.tunable) as base:
        said = own_answers(rows(), Holder(0, 3, base, how(workspace)), 4)
    assert all(said)
    golden = [
        {**row, "response": one.upper() if row["site"] == "site-0" and n % 3 else "never said"}
        for n, (row, one) in enumerate(zip(rows(), said, strict=True))
    ]
    made = recipe(tiny_llama, write(tmp_path, golden), select=[{"by": "s3ft", "tokens": 4}])
    _, result, events = small.play(made, tmp_path / "runs")
    left = [event for event in events if isinstance(event, ClientLeftOut)]
    assert {(event.name, event.code) for event in left} == {("site-1", "D209")} and len(left) == 2
    assert result["rounds"] == 2
    space = small.workspace_of(made)[0]
    mine = next(one for one in space.federation.clients if one.name == "site-0")
    kept, own = space.selected(mine), mine.train
    replaced = [new["response"] for new, old in zip(kept, own, strict=True) if new != old]
    assert replaced and set(replaced) <= set(said)
    assert all(new == old for new, old in zip(kept, own, strict=True) if old["response"] == "never said")
    with pytest.raises(ClientFailed, match="accepts none"):
        space.train(1 - mine.id)


def test_a_judge_may_look_for_a_pattern() -> None:
    judge = S3ft(judge=Answer(pattern=r"= (\d+)"))
    assert judge.accepts("so it = 12", "12 = 12") and not judge.accepts("so it = 13", "12 = 12")
    assert judge.longer == 128 and selected([Pvi(drop=0.0)], [{"a": 1}], Holder(0, 1, None, {}), print) == [
        {"a": 1}
    ]


def test_check_says_what_the_server_learns(workspace: Workspace) -> None:
    table = exposure(method_of(workspace.recipe), build(()), workspace.tunable, workspace.recipe.select)
    assert "of pvi: nothing of which rows" in next(row.sees for row in table if row.verb == "selection")
    plain = exposure(method_of(workspace.recipe), build(()), workspace.tunable)
    assert not [row for row in plain if row.verb == "selection"]


PRIVATE = {"max_grad_norm": 1.0, "noise_multiplier": 1.0, "sample_rate": 0.1}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data__task": "causal-lm", "data__text": "response", "select": [{"by": "pvi"}]}, "'causal-lm'"),
        ({"select": [{"by": "group"}]}, "without data.group"),
        ({"select": [{"by": "pvi"}], "method__train__private": PRIVATE}, "decides about another"),
        ({"select": [{"by": "pvi", "drop": 1.0}]}, "drop"),
        ({"select": [{"by": "s3ft"}], "method": {"type": "sfprompt", "tail": 1}}, "a split model"),
    ],
)
def test_what_means_nothing_is_refused(
    changes: dict[str, Any], said: str, tiny_llama: Path, data: Path
) -> None:
    with pytest.raises(FedtuneError, match=said):
        recipe(tiny_llama, data, **{"data__template": "auto", **changes})

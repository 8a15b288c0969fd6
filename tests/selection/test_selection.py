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
from fedtune.model.curriculum import Curriculum, paced_batches
from fedtune.model.encode import encode
from fedtune.model.settings import TrainSettings
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


def test_paraphrases_stand_in_where_own_answers_are_refused(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Own answers come first, then what the judge accepts of the model's other words; the rest stays."""
    texts = ["one two", "three four", "five six"]
    own = [{"prompt": f"say {text}", "response": text} for text in texts]
    chats = [
        {
            "messages": [
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": row["response"]},
            ]
        }
        for row in own
    ]
    asked: list[list[str]] = []
    answers = {"say one two": "ONE two!", "again: three four": "Three, four."}

    def say(rows: list[dict[str, Any]], holder: Holder, tokens: int) -> list[str]:
        asked.append([row["prompt"] if "prompt" in row else row["messages"][0]["content"] for row in rows])
        return [answers.get(prompt, "else") for prompt in asked[-1]]

    monkeypatch.setattr("fedtune.selection.s3ft.own_answers", say)
    chosen = S3ft(paraphrase="again: {response}")
    for rows_, of in (
        (own, lambda row: row["response"]),
        (chats, lambda row: row["messages"][-1]["content"]),
    ):
        made, said = chosen.choose(rows_, Holder(0, 3, None, {}))
        assert [of(row) for row in made] == ["ONE two!", "Three, four.", "five six"]
        assert asked[-1] == ["again: three four", "again: five six"]
        assert said == "1 of 3 responses replaced by the model's own, 1 by its paraphrases"
        assert [of(row) for row in S3ft().choose(rows_, Holder(0, 3, None, {}))[0]][1] == "three four"


def test_rows_come_in_the_order_of_their_pvi(workspace: Workspace) -> None:
    from fedtune.model.likelihood import base_alone
    from fedtune.selection.pvi import pvi

    own = workspace.federation.clients[0].train
    with base_alone(workspace.tunable) as base:
        holder = Holder(0, 3, base, how(workspace))
        made, said = Pvi(drop=0.25, order=True).choose(own, holder)
        values = pvi(made, holder)
        kept, _ = Pvi(drop=0.25).choose(own, holder)
    assert len(made) == len(kept) > 4 and said.endswith("; the others in order")
    assert sorted(map(str, made)) == sorted(map(str, kept)) and (np.diff(values) <= 1e-9).all()


def test_a_curriculum_draws_from_more_and_more_rows() -> None:
    train = TrainSettings(steps=50, batch=4, accumulate=2, curriculum=Curriculum(start=0.1, until=0.5))
    for done, most in ((0, 0.1), (1, 0.55), (2, 1.0), (3, 1.0)):
        plan = list(paced_batches(200, train, 7, (done, 4)))
        assert len(plan) == 50 and plan == list(paced_batches(200, train, 7, (done, 4)))
        assert all(len(set(micro)) == 4 for step in plan for micro in step)
        first, last = (
            {n for step in part for micro in step for n in micro} for part in (plan[:2], plan[-25:])
        )
        assert max(first) < 200 * (most + 0.05) and max(last) >= 200 * min(most + 0.2, 0.9)
    passes = TrainSettings(steps=0, epochs=3, batch=4, curriculum=Curriculum(start=0.5))
    assert len(list(paced_batches(18, passes, 7, (0, 1)))) == 15
    assert {len(micro) for step in paced_batches(2, passes, 7, (0, 1)) for micro in step} == {1, 2}
    assert (
        passes.depends_on_rounds() == ["method.train.curriculum"] and not TrainSettings().depends_on_rounds()
    )


def test_all_rows_in_one_place_begin_with_what_comes_first_at_each_client(
    tiny_llama: Path, data: Path
) -> None:
    changes = {
        "select": [{"by": "pvi", "drop": 0.0, "order": True}],
        "method__train__curriculum": {"start": 0.2},
    }
    space = small.workspace_of(recipe(tiny_llama, data, **changes))[0]
    firsts = [space.train(number)[0]["input_ids"].tolist() for number in (0, 1)]
    pooled = space.pooled()
    assert [pooled[place]["input_ids"].tolist() for place in (0, 1)] == firsts
    assert len(pooled) == len(space.train(0)) + len(space.train(1))


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


IN_ORDER = {"select": [{"by": "pvi", "order": True}], "method__train__curriculum": {"start": 0.2}}
PRIVATE = {"max_grad_norm": 1.0, "noise_multiplier": 4.0, "sample_rate": 0.1}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data__task": "causal-lm", "data__text": "response", "select": [{"by": "pvi"}]}, "'causal-lm'"),
        ({"select": [{"by": "group"}]}, "without data.group"),
        ({"select": [{"by": "pvi"}], "method__train__private": PRIVATE}, "decides about another"),
        ({"select": [{"by": "pvi", "drop": 1.0}]}, "drop"),
        ({"select": [{"by": "pvi", "order": True}]}, "without .method.train.curriculum"),
        ({"method__train__curriculum": {"start": 0.2}}, "rows in no order"),
        ({**IN_ORDER, "method__train__bucket": 2}, "bucket = 2 with"),
        ({**IN_ORDER, "method__train__together": 2}, "together = 2 with method.train.curriculum"),
        ({**IN_ORDER, "method__type": "fedkseed", "method__estimator": "spsa"}, "clients that walk"),
        ({"select": [{"by": "s3ft", "paraphrase": "say it again"}]}, "paraphrase"),
        ({"select": [{"by": "s3ft"}], "method": {"type": "sfprompt", "tail": 1}}, "a split model"),
    ],
)
def test_what_means_nothing_is_refused(
    changes: dict[str, Any], said: str, tiny_llama: Path, data: Path
) -> None:
    with pytest.raises(FedtuneError, match=said):
        recipe(tiny_llama, data, **{"data__template": "auto", **changes})

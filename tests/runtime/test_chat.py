"""Conversations with a run's model and with its base: each side remembers its own answers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import fedtune
from fedtune.data.sources import SOURCES
from fedtune.errors import FedtuneError
from fedtune.model.stream import Wish
from fedtune.runtime.chat import Chat, Talker, talker
from tests import small, tiny


@pytest.fixture(scope="module")
def talks(tmp_path_factory: pytest.TempPathFactory) -> Talker:
    """A language model that was tuned far enough to say something else than its base."""
    place = tmp_path_factory.mktemp("chat")
    changes = {"data__task": "causal-lm", "data__max_length": 16}
    tree = small.tree(tiny.llama(place / "model"), small.write_rows(place), rounds=1, **changes)
    tree["method"]["train"] |= {"steps": 20, "lr": 0.1}
    return talker(fedtune.simulate(tree, runs=place / "runs").folder)


def test_each_side_answers_by_itself_and_remembers(talks: Talker, monkeypatch: pytest.MonkeyPatch) -> None:
    assert talks.name == "run"
    chat, heard = Chat(talks, Wish(tokens=6)), list[tuple[str, str]]()
    attached = talks.tunable.base.attached
    first = chat.say("the red fox", lambda side, piece: heard.append((side, piece)))
    assert list(first) == ["base", "tuned"] and first["base"] != first["tuned"]
    for side, answer in first.items():
        assert "".join(piece for name, piece in heard if name == side).strip() == answer
        assert chat.past[side] == [
            {"role": "user", "content": "the red fox"},
            {"role": "assistant", "content": answer},
        ]
    assert talks.tunable.base.attached is attached
    asked: list[Any] = []
    plain = chat.pieces

    def noted(side: str, messages: list[dict[str, Any]]) -> Iterator[str]:
        asked.append((side, messages))
        return plain(side, messages)

    monkeypatch.setattr(chat, "pieces", noted)
    second = chat.say("and then", lambda side, piece: None)
    for side, messages in asked:
        assert [one["content"] for one in messages] == ["the red fox", first[side], "and then"]
        assert [one["content"] for one in chat.past[side]] == [
            "the red fox",
            first[side],
            "and then",
            second[side],
        ]
    again = Chat(talks, Wish(tokens=6), sides=("tuned",))
    assert again.say("the red fox", lambda side, piece: None) == {"tuned": first["tuned"]}
    assert list(again.past) == ["tuned"]


def test_prompts(talks: Talker) -> None:
    """Only tasks with conversations say how these are written: another one's template is not used."""
    tokenizer = talks.tunable.base.tokenizer
    messages = [{"role": "user", "content": "the fox"}]
    assert tokenizer.decode(talks.prompt(messages)) == "<|user|>\nthe fox</s>\n<|assistant|>\n"
    source = SOURCES["jsonl"]
    told = {"source": "jsonl", "path": "x", "system": "be brief", "template": "plain"}
    for task, said in (
        ("causal-lm", "<|user|>\nthe fox</s>\n<|assistant|>\n"),
        ("instruct", "<|system|>\nbe brief</s>\n<|user|>\nthe fox</s>\n<|assistant|>\n"),
    ):
        data = source.model_validate(
            told | {"task": task} | ({"template": "auto"} if task == "instruct" else {})
        )
        assert tokenizer.decode(Talker(talks.tunable, data, "x").prompt(messages)) == said


def test_a_text_is_gone_on_with_as_it_is(talks: Talker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some tokenizers end a text: what is to be gone on with loses that end, but not its only token."""
    end = talks.tunable.base.tokenizer.eos_token_id
    assert talks.text_prompt("the fox") == talks.tunable.base.tokenizer("the fox")["input_ids"]

    class Ends:
        eos_token_id = end

        def __call__(self, text: str) -> dict[str, list[int]]:
            return {"input_ids": [*range(10, 10 + len(text)), end]}

    monkeypatch.setattr(talks.tunable.base, "tokenizer", Ends())
    assert talks.text_prompt("abc") == [10, 11, 12] and talks.text_prompt("a") == [10]
    assert talks.text_prompt("") == [end]


def test_a_classifier_does_not_talk(tiny_bert: Path, data: Path, tmp_path: Path) -> None:
    folder, _, _ = small.play(small.recipe(tiny_bert, data, rounds=1), tmp_path)
    with pytest.raises(FedtuneError, match=r"M306.*data\.task = 'classify'.*fedtune predict"):
        talker(folder.path)

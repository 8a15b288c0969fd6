"""An answer piece by piece: what stops it, what is held back, and that it is the answer at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fedtune.errors import FedtuneError
from fedtune.model.stream import Wish, answer, begun, tokens_of_chat
from fedtune.model.tunable import attach
from tests.tables import adapter_of


@pytest.fixture(scope="module")
def tunable(workspace: Any) -> Any:
    return attach(workspace.base("instruct"), adapter_of(kind="lora"), 0)


PROMPT = [20, 30, 40, 50]


def greedy(tunable: Any, count: int, prompt: list[int] = PROMPT) -> list[int]:
    """The likeliest token, again and again."""
    ids = torch.tensor([prompt])
    tunable.net.eval()
    with torch.no_grad():
        for _ in range(count):
            ids = torch.cat([ids, tunable.net(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
    return list(ids[0, len(prompt) :].tolist())


def test_the_pieces_are_the_greedy_answer(tunable: Any) -> None:
    made = answer(tunable, PROMPT, Wish(tokens=8))
    said = "".join(made)
    tokens = greedy(tunable, 8)
    end = tunable.base.tokenizer.eos_token_id
    tokens = tokens[: tokens.index(end)] if end in tokens else tokens
    assert said == tunable.base.tokenizer.decode(tokens, skip_special_tokens=True)
    assert made.asked == 4 and made.said == 8 and made.finish == "length"


def test_a_stop_text_ends_it_and_is_not_said(tunable: Any) -> None:
    whole = "".join(answer(tunable, PROMPT, Wish(tokens=12)))
    stop = whole[4:7]
    for stops in ((stop,), ("never said", stop), (whole[6:8], stop)):
        made = answer(tunable, PROMPT, Wish(tokens=12, stop=stops))
        first = min(place for one in stops if (place := whole.find(one)) >= 0)
        assert "".join(made) == whole[:first] and made.closed.is_set() and made.finish == "stop"
    held = answer(tunable, PROMPT, Wish(tokens=12, stop=(whole[-1] + "x",)))
    assert "".join(held) == whole  # what might have begun a stop text is said at the end


@pytest.mark.parametrize(
    ("text", "stop", "count"),
    [
        ("abc", "cd", 1),
        ("abc", "bcd", 2),
        ("abc", "abc", 0),
        ("abcc", "ccc", 2),
        ("", "a", 0),
        ("ab", "x", 0),
    ],
)
def test_what_may_begin_a_stop_text(text: str, stop: str, count: int) -> None:
    assert begun(text, stop) == count


def test_draws_have_a_seed(tunable: Any) -> None:
    def said(seed: int | None, temperature: float = 1.5, top_p: float = 1.0) -> str:
        return "".join(answer(tunable, PROMPT, Wish(10, temperature, top_p, seed)))

    assert said(1) == said(1) != said(2)
    assert said(3, top_p=1e-6) == "".join(answer(tunable, PROMPT, Wish(10)))  # of one token alone


def test_a_reader_who_leaves_ends_the_work(tunable: Any) -> None:
    made = answer(tunable, PROMPT, Wish(tokens=50))
    made.close()
    assert len("".join(made)) < 10 and made.said == 1


def test_a_prompt_without_room_loses_its_beginning(tunable: Any) -> None:
    long = [20 + n % 90 for n in range(100)]
    made = answer(tunable, long, Wish(tokens=4))
    room = tunable.base.context - 4
    assert made.asked == room
    assert "".join(made) == "".join(answer(tunable, long[-room:], Wish(tokens=4)))


def test_an_error_is_raised_where_somebody_reads(tunable: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any) -> None:
        raise KeyError("broken")

    monkeypatch.setattr("fedtune.model.stream.write", broken)
    with pytest.raises(KeyError, match="broken"):
        list(answer(tunable, PROMPT, Wish(tokens=9)))
    with pytest.raises(FedtuneError, match="D207"):
        answer(tunable, PROMPT, Wish(tokens=tunable.base.context))


def test_a_conversation_ends_with_the_user(tunable: Any) -> None:
    tokenizer = tunable.base.tokenizer
    ask = {"role": "user", "content": "the fox"}
    whole = "<|user|>\nthe fox</s>\n<|assistant|>\n"
    assert tokenizer.decode(tokens_of_chat(tunable, [ask])) == whole
    assert (
        tokenizer.decode(tokens_of_chat(tunable, [ask], "chat", "brief")) == f"<|system|>\nbrief</s>\n{whole}"
    )
    assert tokenizer.decode(tokens_of_chat(tunable, [ask], "plain", "brief")).strip() == "the fox"
    asked = "Q: {prompt} A: "  # a text of columns is not for conversations
    assert tokens_of_chat(tunable, [ask], asked) == tokens_of_chat(tunable, [ask], "plain")
    for messages in ([], [ask, {"role": "assistant", "content": "x"}], [{"content": "x"}]):
        with pytest.raises(FedtuneError, match="C103"):
            tokens_of_chat(tunable, messages)

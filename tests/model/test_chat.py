"""Loss on what the assistant says and on its end marker, and on nothing else, whatever the chat template
does."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import transformers

from fedtune.errors import FedtuneError
from fedtune.model.chat import conversation
from fedtune.model.encode import encode
from tests.model import templates as t

Turns = list[dict[str, Any]]


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Path) -> Any:
    made = transformers.AutoTokenizer.from_pretrained(tiny_llama)
    made.add_special_tokens({"extra_special_tokens": t.SPECIAL})
    return made


def talk(text: str) -> Turns:
    """ "u:the fox a:runs" -> messages; underscores are blanks, so that contents can hold some at their
    ends."""
    roles = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    return [{"role": roles[turn[0]], "content": turn[2:].replace("_", " ")} for turn in text.split(" ")]


def learned(tokenizer: Any, template: str, turns: Turns, **more: Any) -> str:
    """What carries loss, with a bar between stretches; and everything is there, as the template writes it."""
    tokenizer.chat_template = template
    ids, answered = conversation(tokenizer, turns, 1, "model", **more)
    runs, last = [], -2
    for place in answered.nonzero()[0].tolist():
        runs = [*runs, [ids[place]]] if place > last + 1 else [*runs[:-1], [*runs[-1], ids[place]]]
        last = place
    return "|".join(tokenizer.decode(run) for run in runs)


LONG = "s:the_house u:the_fox a:runs u:the_cat a:old_book"
BOT_FIRST = "a:hello u:the_cat a:sleeps"
TWICE = "u:the_fox a:runs a:sleeps u:and a:no"
CASES = {
    "chatml": (t.CHATML, LONG, "runs<|im_end|>\n|old book<|im_end|>\n"),
    "chatml, the bot first": (t.CHATML, BOT_FIRST, "hello<|im_end|>\n|sleeps<|im_end|>\n"),
    "chatml, twice": (t.CHATML, TWICE, "runs<|im_end|>\n|sleeps<|im_end|>\n|no<|im_end|>\n"),
    "chatml, an answer like its question": (
        t.CHATML,
        "u:runs a:runs u:runs a:runs",
        "runs<|im_end|>\n|runs<|im_end|>\n",
    ),
    "chatml, system in the middle": (
        t.CHATML,
        "u:the a:fox s:be_old u:the a:cat",
        "fox<|im_end|>\n|cat<|im_end|>\n",
    ),
    "chatml, empty system": (t.CHATML, "s: u:the a:fox", "fox<|im_end|>\n"),
    "chatml, an assistant that says nothing": (t.CHATML, "u:the a: u:the a:cat", "cat<|im_end|>\n"),
    "qwen2.5, its own system turn": (t.QWEN25, "u:the_fox a:runs", "runs<|im_end|>\n"),
    "qwen2.5, the bot first": (t.QWEN25, BOT_FIRST, "hello<|im_end|>\n|sleeps<|im_end|>\n"),
    "qwen2.5, nobody else": (t.QWEN25, "a:hello", "hello<|im_end|>\n"),
    "qwen3, no reasoning": (
        t.QWEN3,
        "u:the a:fox u:the a:cat",
        "fox<|im_end|>\n|<think>\n\n</think>\n\ncat<|im_end|>\n",
    ),
    "qwen3, reasoning in the text": (
        t.QWEN3,
        "u:the a:<think>a_dog</think>fox u:the a:<think>\nthe_dog\n</think>\n\ncat",
        "fox<|im_end|>\n|<think>\nthe dog\n</think>\n\ncat<|im_end|>\n",
    ),
    "llama 3, the bot first": (t.LLAMA3, BOT_FIRST, "hello<|eot_id|>|sleeps<|eot_id|>"),
    "llama 3, stripped": (t.LLAMA3, "s:the_house u:the a:_fox_ u:a a:_cat\n", "fox<|eot_id|>|cat<|eot_id|>"),
    "llama 3 that always asks": (t.LLAMA3_FIRST, LONG, "runs<|eot_id|>|old book<|eot_id|>"),
    "llama 3 that always asks, the bot first": (
        t.LLAMA3_FIRST,
        BOT_FIRST,
        "hello<|eot_id|>|sleeps<|eot_id|>",
    ),
    "mistral": (t.MISTRAL, LONG, " runs</s>| old book</s>"),
    "gemma": (t.GEMMA, "u:the_fox a:_runs u:the_cat a:old", "runs<end_of_turn>\n|old<end_of_turn>\n"),
    "zephyr": (t.ZEPHYR, LONG, "runs</s>\n|old book</s>\n"),
    "zephyr, twice": (t.ZEPHYR, TWICE, "runs</s>\n|sleeps</s>\n|no</s>\n"),
    "phi-3": (t.PHI3, LONG, "runs<|end|>\n|old book<|end|>\n</s>"),
    "deepseek": (
        t.DEEPSEEK,
        "u:the a:<think>so</think>fox u:the a:<think>dog</think>cat",
        "fox<|eos|>|cat<|eos|>",
    ),
    "asks users only": (t.POLITE, TWICE, "runs<|im_end|>\n|sleeps<|im_end|>\n|no<|im_end|>\n"),
    "asks with a reasoning, which a name keeps away": (
        t.NAMED,
        "u:the a:fox u:the a:cat",
        "fox<|im_end|>\n|cat<|im_end|>\n",
    ),
    "never ends with an assistant": (
        t.STRICT,
        "u:the a:fox s:the u:a a:cat u:no",
        "fox<|im_end|>\n|cat<|im_end|>\n",
    ),
    "plain words, the end of text behind the last turn": (
        t.WORDS,
        "a:hello u:the a:fox u:the a:cat",
        "hello|fox|cat</s>",
    ),
    "gpt-oss": (
        t.GPT_OSS,
        LONG,
        "<|channel|>final<|message|>runs<|end|>|<|channel|>final<|message|>old book<|return|>",
    ),
    "counts its turns": (t.COUNTED, BOT_FIRST, "hello<|im_end|>\n|sleeps<|im_end|>\n"),
    "granite, the bot first": (t.GRANITE, BOT_FIRST, "hello</s>\n|sleeps</s>\n"),
    "never asks": (t.BARE, LONG, "runs<|im_end|>\n|old book<|im_end|>\n"),
    "never asks, the bot first": (t.BARE, BOT_FIRST, "hello<|im_end|>\n|sleeps<|im_end|>\n"),
}


@pytest.mark.parametrize("case", CASES)
def test_only_what_the_assistant_says_is_learned(case: str, tokenizer: Any) -> None:
    template, turns, want = CASES[case]
    assert learned(tokenizer, template, talk(turns)) == want
    ids, _ = conversation(tokenizer, talk(turns), 1, "model")
    assert "strftime_now" in template or tokenizer.decode(ids) == tokenizer.apply_chat_template(
        talk(turns), tokenize=False
    )


@pytest.mark.parametrize("turns", [LONG, BOT_FIRST, TWICE, "u:said a:said u:x a:said"])
def test_a_template_that_marks_what_is_generated_agrees(turns: str, tokenizer: Any) -> None:
    learned(tokenizer, t.SMOL3, talk(turns))
    ids, answered = conversation(tokenizer, talk(turns), 1, "model", day=date.today())
    marked = tokenizer.apply_chat_template(talk(turns), return_assistant_tokens_mask=True, return_dict=True)
    assert (ids, answered.astype(int).tolist()) == (marked["input_ids"], marked["assistant_masks"])


def test_todays_date_is_the_recipes(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y %H:%M, %A %-d %B, day %j, 100%%d') }} " + t.CHATML
    shown = [
        tokenizer.decode(conversation(tokenizer, talk("u:a a:b"), 1, "m", **day)[0])
        for day in ({}, {"day": date(2026, 7, 4)})
    ]
    assert shown[0].startswith("01 Jan 2025 00:00, Wednesday 1 January, day 001, 100%d <|im_start|>")
    assert shown[1].startswith("04 Jul 2026 00:00, Saturday 4 July, day 185, 100%d <|im_start|>")
    assert learned(tokenizer, t.LLAMA3, talk("u:a a:b")) == "b<|eot_id|>"


@pytest.mark.parametrize(
    ("template", "turns"), [(t.MISTRAL, "u:a u:b a:c"), (t.MISTRAL, "a:c u:b"), (t.GEMMA, "s:a u:b a:c")]
)
def test_what_a_template_refuses_is_a_sentence(template: str, turns: str, tokenizer: Any) -> None:
    with pytest.raises(
        FedtuneError, match=r"D203: found row 1 \('[abc]'\), which the chat template rejects \((roles|System)"
    ):
        learned(tokenizer, template, talk(turns))


def test_a_tokenizer_without_places_is_a_sentence(tokenizer: Any) -> None:
    slow = transformers.ByT5Tokenizer(chat_template=t.CHATML)
    with pytest.raises(FedtuneError, match=r"M307.*chat messages with m.*tokenizer\.json"):
        conversation(slow, talk("u:a a:b"), 1, "m")
    with pytest.raises(FedtuneError, match=r"D203.*row 3 without messages"):
        conversation(tokenizer, [], 3, "m")


def test_a_template_that_hides_a_turn_is_refused(tokenizer: Any) -> None:
    with pytest.raises(FedtuneError, match=r"D203.*row 1 \('a'\) whose turn 1 cannot be found"):
        learned(
            tokenizer,
            t.CHATML.replace("messages %}", "messages if m.role == 'user' or m.content == 'd' %}"),
            talk("u:a a:b u:c a:d"),
        )


# --- tool calls and other keys ---

CALL = {"type": "function", "function": {"name": "find", "arguments": {"what": "the fox"}}}
TOOL = {
    "type": "function",
    "function": {"name": "find", "description": "finds", "parameters": {"type": "object", "properties": {}}},
}


def called(arguments: Any = None, **more: Any) -> Turns:
    function = {
        "name": "find",
        "arguments": CALL["function"]["arguments"] if arguments is None else arguments,
    }  # type: ignore[index]
    call = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": function}],
        **more,
    }
    return [*talk("u:the_fox"), call, *talk("t:here u:the_cat a:old")]


@pytest.mark.parametrize(
    "arguments", [{"what": "the fox"}, '{"what": "the fox"}', {}, "{}", {"n": 1, "on": [True, {"a": "b"}]}]
)
def test_a_tool_call_is_what_is_learned(arguments: Any, tokenizer: Any) -> None:
    written = arguments if isinstance(arguments, str) else json.dumps(arguments)
    call = '\n<tool_call>\n{"name": "find", "arguments": ' + written + "}\n</tool_call><|im_end|>\n"
    assert learned(tokenizer, t.QWEN25, called(arguments)) == call + "|old<|im_end|>\n"
    assert learned(tokenizer, t.QWEN25, called(arguments), tools=[TOOL]) == call + "|old<|im_end|>\n"
    assert learned(tokenizer, t.QWEN25, called(arguments, content="so:")) == "so:" + call + "|old<|im_end|>\n"
    assert learned(tokenizer, t.QWEN25, called(arguments)[:2]) == call
    assert (
        learned(tokenizer, t.LLAMA3, called(arguments))
        == '{"name": "find", "parameters": ' + written + "}<|eot_id|>|old<|eot_id|>"
    )
    final = "<|channel|>final<|message|>old<|return|>"
    assert (
        learned(tokenizer, t.GPT_OSS, called(arguments))
        == " to=find<|message|>" + written + "<|call|>|" + final
    )
    assert (
        learned(tokenizer, t.DEEPSEEK, called(arguments)) == "<|tool|>find\n" + written + "<|eos|>|old<|eos|>"
    )


def test_tools_and_calls_that_a_template_does_not_show_are_refused_by_name(tokenizer: Any) -> None:
    thought = [*talk("u:a"), {"role": "assistant", "content": "b", "reasoning_content": "because"}]
    for template, turns, more, key in (
        (t.CHATML, called(), {}, "tool_calls"),
        (t.CHATML, called(content="so"), {}, "tool_calls"),
        (t.CHATML, talk("u:a a:b"), {"tools": [TOOL]}, "tools"),
        (t.CHATML, thought, {}, "reasoning_content"),
        (
            t.CHATML.replace("m.content +", "m.content + ('<call>' if m.tool_calls else '') +"),
            called(),
            {},
            "tool_calls",
        ),  # that, but not what
    ):
        with pytest.raises(FedtuneError, match=rf"D203.*row 1 \(.*\) with '{key}'.*chat template of model"):
            learned(tokenizer, template, turns, **more)


def test_reasoning_reaches_a_template_that_shows_it(tokenizer: Any) -> None:
    thought = {"role": "assistant", "content": "fox", "reasoning_content": "the dog"}
    assert (
        learned(tokenizer, t.QWEN3, [*talk("u:the"), thought])
        == "<think>\nthe dog\n</think>\n\nfox<|im_end|>\n"
    )
    assert (
        learned(tokenizer, t.QWEN3, [*talk("u:the"), thought, *talk("u:a a:b")])
        == "fox<|im_end|>\n|<think>\n\n</think>\n\nb<|im_end|>\n"
    )


def test_a_message_of_weight_0_carries_no_loss(tokenizer: Any) -> None:
    turns = talk("u:a a:b u:c a:d")
    turns[1]["weight"], turns[3]["weight"] = 0, 1
    assert learned(tokenizer, t.CHATML, turns) == "d<|im_end|>\n"
    turns[1]["weight"] = 0.5
    with pytest.raises(FedtuneError, match=r"D203.*weight 0\.5"):
        learned(tokenizer, t.CHATML, turns)


def test_other_keys_reach_the_template_or_are_counted(workspace: Any) -> None:
    base = workspace.load("instruct")
    named = [{"role": "user", "content": "a", "name": "Ann", "id": 7}, {"role": "assistant", "content": "b"}]
    assert encode([{"messages": named}, {"messages": talk("u:a a:b")}], base, max_length=32).unshown == {
        "name": 1,
        "id": 1,
    }
    base.tokenizer.chat_template = base.tokenizer.chat_template.replace(
        "m['content']", "m.name|default('') + ': ' + m['content']"
    )
    encoded = encode([{"messages": named}], base, max_length=32)
    assert encoded.unshown == {"id": 1} and "Ann: a" in base.tokenizer.decode(encoded[0]["input_ids"])


# --- prompt and response ---


def shown(base: Any, **settings: Any) -> tuple[str, str]:
    """All of a row's text, and what of it carries loss."""
    example = encode([{"prompt": "2+2?", "response": "It is four."}], base, max_length=64, **settings)[0]
    return base.tokenizer.decode(example["input_ids"]), base.tokenizer.decode(
        example["labels"][example["labels"] >= 0]
    )


def test_prompt_and_response_through_the_models_own_template(workspace: Any) -> None:
    base = workspace.load("instruct")
    assert (
        shown(base, template="auto")
        == shown(base, template="chat")
        == ("<|user|>\n2+2?</s>\n<|assistant|>\nIt is four.</s>\n", "It is four.</s>\n")
    )
    assert shown(base, template="auto", system="be kind")[0].startswith("<|system|>\nbe kind</s>\n<|user|>")
    assert shown(base, template="plain") == ("2+2?It is four.</s>", "It is four.</s>")
    base.tokenizer.chat_template = None
    assert shown(base, template="auto") == ("2+2?\nIt is four.</s>", "It is four.</s>")
    for row in (
        {"prompt": "A:", "response": " four"},
        {"prompt": "A: ", "response": "four"},
    ):  # whoever took care of it has the same text as ever
        one, other = (
            encode([row], base, max_length=64, template=how)[0]["input_ids"].tolist()
            for how in ("auto", "plain")
        )
        assert one == other
    for settings in ({"template": "chat"}, {"template": "auto", "system": "be kind"}):
        with pytest.raises(FedtuneError, match="M307"):
            shown(base, **settings)


def test_a_system_message_for_conversations_without_one(workspace: Any) -> None:
    base = workspace.base("instruct")
    rows = [{"messages": talk("u:a a:b")}, {"messages": talk("s:own u:a a:b")}]
    texts = [
        base.tokenizer.decode(e["input_ids"])
        for e in encode(rows, base, max_length=64, system="be kind").examples
    ]
    assert [text.partition("</s>")[0] for text in texts] == ["<|system|>\nbe kind", "<|system|>\nown"]

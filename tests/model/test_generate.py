"""What a model answers in batches is what it answers alone, token by token without a cache."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fedtune import config
from fedtune.errors import FedtuneError
from fedtune.model.generate import Question, ends, generated, questions
from fedtune.model.tunable import attach
from fedtune.sinks.console import table
from tests import small, tiny
from tests.tables import adapter_of

ROWS = [
    {"prompt": " ".join(sentence.split()[: 2 + n % 3]), "response": " ".join(sentence.split()[4:])}
    for n, sentence in enumerate(tiny.SENTENCES[:5])
]


def by_hand(tunable: Any, prompt: list[int], tokens: int) -> str:
    """The likeliest token again and again, the whole text read anew each time."""
    ids = list(prompt)
    for _ in range(tokens):
        with torch.no_grad():
            logits = tunable.net(input_ids=torch.tensor([ids]), use_cache=tunable.in_cache).logits[0, -1]
        ids.append(int(logits.argmax()))
        if ids[-1] in ends(tunable):
            break
    said: str = tunable.base.tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True)
    return said.strip()


@pytest.mark.parametrize("kind", ["lora", "prompt", "adapter"])
def test_batches_with_a_cache_say_what_single_texts_say(workspace: Any, kind: str) -> None:
    base = workspace.base("causal")
    tunable = attach(base, adapter_of(kind=kind), 1)
    asked = questions(ROWS, tunable, "auto")
    want = [by_hand(tunable, question.tokens, 6) for question in asked]
    assert len(set(want)) > 1
    for batch in (1, 2, 5):
        assert generated(tunable, asked, 6, batch) == want


def test_the_template_asks_as_it_did_in_training(workspace: Any) -> None:
    base = workspace.base("causal")
    tunable = attach(base, adapter_of(kind="lora"), 0)
    (one,) = questions(ROWS[:1], tunable, "auto")
    text = base.tokenizer.decode(one.tokens)
    assert ROWS[0]["prompt"] in text and ROWS[0]["response"] not in text and one.wanted == ROWS[0]["response"]
    if base.tokenizer.chat_template:
        assert text.rstrip().endswith("<|assistant|>")
    with pytest.raises(FedtuneError, match=r"generate\.tokens"):
        generated(tunable, [Question([1], "")], base.context or 10**9)


def test_a_run_of_instructions_says_its_metrics(tiny_llama: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS * 8))
    tree = small.tree(tiny_llama, path, rounds=1) | {
        "data": {
            "source": "jsonl",
            "path": str(path),
            "task": "instruct",
            "max_length": 60,
            "test_share": 0.3,
        },
        "metrics": [
            {"metric": "exact-match"},
            {"metric": "rouge-l"},
            {"metric": "answer", "pattern": r"\w+$"},
        ],
        "generate": {"rows": 4, "tokens": 5, "batch": 3, "samples": 2},
    }
    tree["evaluate"]["base"] = True
    result = small.play(config.parse(tree), tmp_path)[1]
    own = result["figures"]["federated"]
    assert (
        {"exact_match", "rouge_l", "answer"} < own.keys()
        and own["rows"] == 4
        and result["metric"] == "perplexity"
    )
    assert [sample.keys() for sample in result["samples"]] == [{"asked", "wanted", "federated", "base"}] * 2
    assert {sample["wanted"] for sample in result["samples"]} <= {str(row["response"]) for row in ROWS}
    assert "question 2" in table(result) and f"wanted      {result['samples'][1]['wanted']}" in table(result)

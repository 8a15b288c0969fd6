"""Every task from a file to a result, with the local engine: tiny models, a few rows, the numbers that must
hold."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fedtune import config
from fedtune.events import Truncated
from fedtune.runtime.check import check
from fedtune.runtime.check import rows as checked_rows
from tests import small
from tests.tiny import SENTENCES


def tree(model: Path, data: dict[str, Any], kind: str = "lora") -> dict[str, Any]:
    return {
        "seed": 5,
        "rounds": 2,
        "model": {"name": str(model), "threads": 1},
        "data": {"max_length": 16, "test_share": 0.2, "client_test_share": 0.2, **data},
        "partition": {"by": "iid", "clients": 2},
        "method": {"adapter": {"kind": kind}, "train": {"lr": 0.01, "steps": 6, "batch": 4}},
        "evaluate": {"local": False, "centralised": False},
    }


def play(recipe: dict[str, Any], root: Path) -> tuple[dict[str, Any], list[Any]]:
    _, result, events = small.play(config.parse(recipe), root)
    return result, events


def test_next_tokens_of_plain_text(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("\n\n".join(SENTENCES * 12))
    data = {"source": "text", "path": str(tmp_path / "text.txt"), "task": "causal-lm"}
    result, _ = play(tree(tiny_llama, data), tmp_path)
    assert result["metric"] == "perplexity" and 1 < result["federated"] < 0.8 * result["base"]


@pytest.mark.parametrize("shape", ["chat", "prompt"])
def test_responses_to_prompts(shape: str, tiny_llama: Path, tmp_path: Path) -> None:
    lines = []
    for number in range(40):
        prompt, answer = SENTENCES[number % 3], "yes" if number % 2 else "no"
        chat = [{"role": "user", "content": prompt[:12]}, {"role": "assistant", "content": answer}]
        lines.append({"messages": chat} if shape == "chat" else {"prompt": prompt[:12], "response": answer})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = {"source": "jsonl", "path": str(tmp_path / "rows.jsonl"), "task": "instruct", "max_length": 40}
    result, events = play(
        tree(tiny_llama, data | ({"messages": "messages"} if shape == "chat" else {})), tmp_path
    )
    assert result["metric"] == "perplexity" and result["federated"] < 0.8 * result["base"]
    assert not [e for e in events if isinstance(e, Truncated)]


def test_a_recipes_template_system_and_date_reach_the_texts(tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    for file in tiny_llama.iterdir():
        (tmp_path / "model" / file.name).write_bytes(file.read_bytes())
    template = tmp_path / "model" / "chat_template.jinja"
    template.write_text("{{ strftime_now('%Y') }}" + template.read_text())
    rows = [
        {
            "prompt": "2+2?",
            "response": "four",
            "messages": [
                {"role": "user", "content": "2+2?", "name": "Ann"},
                {"role": "assistant", "content": "four"},
            ],
        }
    ] * 20
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"source": "jsonl", "path": str(tmp_path / "rows.jsonl"), "task": "instruct", "max_length": 60}

    def text(**settings: Any) -> str:
        workspace, _ = small.workspace_of(config.parse(tree(tmp_path / "model", data | settings)))
        encoded = [
            workspace.train(0)[0],
            workspace.test()[0],
            workspace.held_out(1)[0],
            workspace.pooled()[0],
        ]
        shown = {workspace.base.tokenizer.decode(example["input_ids"]) for example in encoded}
        assert len(shown) == 1
        return shown.pop()

    chat = "<|user|>\n2+2?</s>\n<|assistant|>\nfour</s>\n"
    assert text() == text(messages="messages") == "2025" + chat
    assert text(date="2031-05-06", system="add") == "2031<|system|>\nadd</s>\n" + chat
    assert text(template="plain") == "2+2?four</s>"
    assert text(template="Q: {prompt}\nA: ") == "Q: 2+2?\nA: four</s>"
    lines = checked_rows(
        check(config.parse(tree(tmp_path / "model", data | {"messages": "messages", "max_length": 16})))
    )
    said = [line.split(None, 1)[1] for line in lines if line.startswith("texts")]
    n = 12  # of 20 rows, 4 are the test set, 2 of each client's 8 are held out
    assert said == [
        f"{n} of {n} training rows are longer than 16 tokens, 0 keep no response",
        f"{n} of {n} training rows have messages with 'name', which the chat template does not show",
    ]


def test_what_is_cut_is_said(tiny_bert: Path, tmp_path: Path) -> None:
    recipe = small.recipe(tiny_bert, small.write_rows(tmp_path), data__max_length=6)
    _, _, events = small.play(recipe, tmp_path)
    said = [e for e in events if isinstance(e, Truncated)]
    assert sum(e.cut for e in said if e.whose.startswith("client")) == sum(
        e.rows for e in said if e.whose.startswith("client")
    )


def test_classes_of_images_in_folders(tiny_vit: Path, tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    for label, level in (("dark", 40), ("light", 200)):
        (tmp_path / "images" / label).mkdir(parents=True)
        for number in range(20):
            pixels = np.clip(draw.normal(level, 20, (8, 8, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / label / f"{number}.png")
    data = {"source": "images", "path": str(tmp_path / "images"), "task": "image-classify"}
    result, _ = play(tree(tiny_vit, data), tmp_path)
    assert result["metric"] == "accuracy" and result["federated"] >= 0.9


def test_classes_of_rows_in_csv_and_parquet_give_the_same_run(tiny_bert: Path, tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = small.rows(60)
    columns = {key: [row[key] for row in rows] for key in ("text", "label")}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "rows.parquet")
    (tmp_path / "rows.csv").write_text(
        "text,label\n" + "".join(f"{row['text']},{row['label']}\n" for row in rows)
    )
    digests = set()
    for source in ("csv", "parquet"):
        data = {"source": source, "path": str(tmp_path / f"rows.{source}"), "task": "classify"}
        digests.add(play(tree(tiny_bert, data), tmp_path / source)[0]["state_sha256"])
    assert len(digests) == 1


def test_sampling_asks_some_clients_and_always_the_same(tiny_bert: Path, tmp_path: Path) -> None:
    recipe = small.recipe(tiny_bert, small.write_rows(tmp_path), sampling={"fraction": 0.5}, rounds=4)
    asked = []
    for name in ("a", "b"):
        _, result, events = small.play(recipe, tmp_path / name)
        asked.append([(e.round, e.client) for e in events if type(e).__name__ == "ClientDone"])
    assert asked[0] == asked[1] and len(asked[0]) == 8 and len({c for _, c in asked[0]}) > 2
    assert math.isclose(result["up_bytes_per_client_round"], 4 * result["trainable"], rel_tol=0.1)

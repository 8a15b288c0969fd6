"""Rows to numbers: which tokens are there, which carry loss, what was cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fedtune.errors import FedtuneError
from fedtune.model.encode import encode
from tests import tiny

IGNORED = -100


def test_classify_keeps_the_last_special_token_when_it_cuts(workspace: Any) -> None:
    base = workspace.base("encoder")
    rows = [
        {"text": "the red fox", "label": "b"},
        {"text": "the red fox runs over the green hill", "label": "a"},
    ]
    encoded = encode(rows, base, max_length=6)
    ids = [e["input_ids"].tolist() for e in encoded.examples]
    assert [len(line) for line in ids] == [5, 6]  # [CLS] the red fox [SEP]; [CLS] 4 words [SEP]
    assert [line[0] for line in ids] == [2, 2]
    assert [line[-1] for line in ids] == [3, 3]
    assert (encoded.truncated, encoded.dropped, encoded.tokens, len(encoded)) == (1, 0, 11, 2)
    batch = encoded.collate([1, 0])
    assert batch["labels"].tolist() == [0, 1]
    assert batch["input_ids"].dtype == torch.int64
    assert batch["attention_mask"].tolist() == [[1] * 6, [1] * 5 + [0]]
    assert batch["input_ids"][1, 5] == 0  # [PAD]


def test_overlong_rows_can_be_refused(workspace: Any) -> None:
    rows = [{"text": "the", "label": "a"}, {"text": "the red fox runs over the green hill", "label": "a"}]
    with pytest.raises(FedtuneError, match=r"D207.*row 2 with 10 tokens.*6"):
        encode(rows, workspace.base("encoder"), max_length=6, overlong="refuse")
    with pytest.raises(FedtuneError, match=r"D207.*32 tokens"):
        encode(rows, workspace.base("encoder"), max_length=33)


def test_unknown_labels_and_empty_cells(workspace: Any) -> None:
    base = workspace.base("encoder")
    with pytest.raises(FedtuneError, match=r"D206.*'c' in row 2"):
        encode([{"text": "x", "label": "a"}, {"text": "x", "label": "c"}], base, max_length=8)
    with pytest.raises(FedtuneError, match=r"D203.*'label'"):
        encode([{"text": "x"}], base, max_length=8)
    with pytest.raises(FedtuneError, match=r"D203.*row 1"):
        encode([{"text": None, "label": "a"}], base, max_length=8)


def test_a_stream_is_cut_in_blocks_without_losing_a_token(workspace: Any) -> None:
    base = workspace.base("causal")
    rows = [{"text": text} for text in tiny.SENTENCES[:3]]
    stream = [
        t
        for row in rows
        for t in [
            *base.tokenizer(row["text"], add_special_tokens=False)["input_ids"],
            base.tokenizer.eos_token_id,
        ]
    ]
    encoded = encode(rows, base, max_length=8)
    assert np.concatenate([e["input_ids"] for e in encoded.examples]).tolist() == stream
    assert all(len(e["input_ids"]) == 8 for e in encoded.examples[:-1])
    assert encoded.tokens == len(stream) - len(encoded)  # the first token of a block is not predicted

    overlapping = encode(rows, base, max_length=8, stride=4)
    assert all(
        np.array_equal(e["input_ids"], stream[4 * i : 4 * i + 8]) for i, e in enumerate(overlapping.examples)
    )
    assert len(overlapping) == -(-(len(stream) - 8) // 4) + 1

    bare = encode(rows, base, max_length=8, separator="none")
    assert sum(len(e["input_ids"]) for e in bare.examples) == len(stream) - 3


def test_a_separator_needs_an_end_of_text_token(workspace: Any) -> None:
    base = workspace.load("causal")
    base.tokenizer.eos_token = None
    with pytest.raises(FedtuneError, match=r"C104.*separator"):
        encode([{"text": "the"}], base, max_length=8)


def test_a_prompt_carries_no_loss(workspace: Any) -> None:
    base = workspace.base("instruct")
    ids = lambda text: base.tokenizer(text, add_special_tokens=False)["input_ids"]
    encoded = encode([{"prompt": "the red fox", "response": " runs over"}], base, max_length=32)
    asked, answered = ids("the red fox"), [*ids(" runs over"), 1]
    assert encoded[0]["input_ids"].tolist() == asked + answered
    assert encoded[0]["labels"].tolist() == [IGNORED] * len(asked) + answered
    assert encoded.tokens == len(answered)
    padded = encode(
        [{"prompt": "the", "response": " red"}, {"prompt": "the red fox runs", "response": " over the hill"}],
        base,
        max_length=32,
    ).collate([0, 1])
    assert (padded["labels"][0][padded["attention_mask"][0] == 0] == IGNORED).all()
    assert (
        padded["labels"][0] == 1
    ).sum() == 1  # the end of text that was said, not the padding (the same token here)


def test_cut_responses_are_counted_and_empty_ones_left_out(workspace: Any) -> None:
    base = workspace.base("instruct")
    rows = [
        {"prompt": "the red fox runs over the green hill", "response": " slow"},
        {"prompt": "the", "response": " red fox runs over the green hill"},
        {"prompt": "a", "response": " b"},
    ]
    encoded = encode(rows, base, max_length=5)
    assert (len(encoded), encoded.truncated, encoded.dropped) == (2, 2, 1)


def test_chat_loss_token_by_token(workspace: Any) -> None:
    base = workspace.base("instruct")
    talk = [
        {"role": "system", "content": "the house"},
        {"role": "user", "content": "the red fox"},
        {"role": "assistant", "content": "runs"},
        {"role": "user", "content": "the cat"},
        {"role": "assistant", "content": "sleeps"},
    ]
    encoded = encode([{"messages": talk}], base, max_length=64)
    labels = encoded[0]["labels"]
    assert base.tokenizer.decode(labels[labels != IGNORED]) == "runs</s>\nsleeps</s>\n"
    whole = base.tokenizer.apply_chat_template(talk, tokenize=False)
    assert base.tokenizer.decode(encoded[0]["input_ids"]) == whole


def test_a_template_that_rewrites_earlier_turns(workspace: Any) -> None:
    """Reasoning templates show an empty <think> only in the last turn, so a rendering up to turn i is no
    prefix of the whole."""
    base = workspace.load("instruct")
    base.tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}{% if m['role'] == 'assistant' and loop.last "
        "%}{{ '<think></think>' }}{% endif %}"
        "{{ m['content'] + '</s>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif "
        "%}"
    )
    talk = [
        {"role": r, "content": c}
        for r, c in (("user", "the fox"), ("assistant", "runs"), ("user", "the runs"), ("assistant", "old"))
    ]
    encoded = encode([{"messages": talk}], base, max_length=64)
    labels = encoded[0]["labels"]
    assert base.tokenizer.decode(labels[labels != IGNORED]) == "runs</s><think></think>old</s>"


def test_chat_without_a_template_and_rows_that_are_no_chat(workspace: Any) -> None:
    base = workspace.load("instruct")
    with pytest.raises(FedtuneError, match=r"D203.*row 1"):
        encode([{"messages": "hello"}], base, max_length=64)
    base.tokenizer.chat_template = None
    with pytest.raises(FedtuneError, match="M307"):
        encode([{"messages": [{"role": "user", "content": "x"}]}], base, max_length=64)


def test_images_equal_the_processor_in_one_go(workspace: Any, tmp_path: Path) -> None:
    base = workspace.base("images")
    colour = np.random.default_rng(1).integers(0, 256, (12, 9, 3), dtype=np.uint8)
    grey = colour[:, :, 0]
    Image.fromarray(colour).save(tmp_path / "a.png")
    rows = [
        {"image": image, "label": "a"}
        for image in (colour, grey, grey[:, :, None], str(tmp_path / "a.png"), Image.fromarray(grey))
    ]
    encoded = encode(rows, base)
    batch = encoded.collate(range(5))
    assert batch["pixel_values"].shape == (5, 3, 8, 8)
    assert (encoded.tokens, encoded[0]["pixels"].dtype) == (5, np.uint8)
    want = base.tokenizer(images=[colour, np.repeat(grey[:, :, None], 3, 2)], return_tensors="pt")[
        "pixel_values"
    ]
    assert torch.allclose(batch["pixel_values"][:2], want, atol=1e-6)
    assert torch.equal(batch["pixel_values"][1], batch["pixel_values"][2])
    assert torch.equal(batch["pixel_values"][0], batch["pixel_values"][3])
    assert torch.equal(batch["pixel_values"][1], batch["pixel_values"][4])
    for wrong in (np.zeros((3, 3)), str(tmp_path / "nothing.png"), 7):
        with pytest.raises(FedtuneError, match=r"D203.*row 1"):
            encode([{"image": wrong, "label": "a"}], base)


def test_no_rows_are_no_examples(workspace: Any) -> None:
    for name in ("causal", "instruct", "encoder", "images"):
        assert len(encode([], workspace.base(name), max_length=8)) == 0

"""Exports for other programs, each loaded by the program itself, which then says what our model says."""

from __future__ import annotations

import json
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import peft
import pytest
import torch
import transformers

import fedtune
from fedtune.cli import main
from fedtune.errors import FedtuneError
from fedtune.model import gguf_file
from fedtune.model.base import load
from fedtune.model.programs import refuse_vllm
from fedtune.model.settings import ModelSettings
from fedtune.model.tunable import attach
from tests import small, tiny
from tests.tables import adapter_of

ASKED = "the red fox sleeps by the fire"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("programs")
    tiny.llama(folder / "llama")
    tiny.bert(folder / "bert")
    rows = [{"prompt": f"say {word}", "response": word} for word in ("fox", "cat", "dog") * 8]
    (folder / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    small.write_rows(folder)
    return folder


def trained(place: Path, name: str, **changes: Any) -> Path:
    """A run of one round, made once."""
    folder = place / "runs" / name
    if not folder.exists():
        text = changes.get("data__task") == "instruct"
        model, rows = (
            (place / "llama", place / "asked.jsonl") if text else (place / "bert", place / "rows.jsonl")
        )
        tree = small.tree(model, rows, rounds=1, name=name, **changes)
        fedtune.simulate(tree, runs=place / "runs")
    return folder


@pytest.fixture(scope="module")
def language(place: Path) -> Path:
    return trained(place, "language", data__task="instruct", data__max_length=40, method__train__lr=0.05)


def logits(net: Any, tokenizer: Any) -> np.ndarray:
    with torch.no_grad():
        return net.eval()(**tokenizer(ASKED, return_tensors="pt")).logits.numpy()


@pytest.fixture(scope="module")
def wanted(language: Path) -> np.ndarray:
    return logits(*fedtune.load(language))


def test_training_moved_the_model(place: Path, wanted: np.ndarray) -> None:
    base = transformers.AutoModelForCausalLM.from_pretrained(place / "llama")
    assert (
        np.abs(logits(base, transformers.AutoTokenizer.from_pretrained(place / "llama")) - wanted).max()
        > 1e-2
    )


@pytest.mark.parametrize("program", ["peft", "vllm"])
def test_peft_loads_its_adapter(
    program: str, place: Path, language: Path, wanted: np.ndarray, tmp_path: Path
) -> None:
    assert main(["export", str(language), "--for", program, "--to", str(tmp_path / "out")]) == 0
    base = transformers.AutoModelForCausalLM.from_pretrained(place / "llama")
    net = peft.PeftModel.from_pretrained(base, tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    np.testing.assert_allclose(logits(net, tokenizer), wanted, rtol=1e-4, atol=1e-5)
    said = (tmp_path / "out" / "README.md").read_text()
    assert ("--enable-lora --max-lora-rank 8" in said) == (program == "vllm")


def test_transformers_loads_the_merged_model(language: Path, wanted: np.ndarray, tmp_path: Path) -> None:
    fedtune.export(language, tmp_path / "out", program="merged")
    net = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    np.testing.assert_allclose(logits(net, tokenizer), wanted, rtol=1e-4, atol=1e-5)


def test_a_gguf_file_is_the_merged_model(
    language: Path, wanted: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers' own reader of GGUF files gives back every number, and the tokenizer every id."""
    fedtune.export(language, tmp_path / "out", program="gguf")
    known: Any = {"gguf_file": "model.gguf"}
    net = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, **known)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out", **known)
    own = fedtune.load(language)[1]
    for text in (*tiny.SENTENCES, "Ünïcode 42!\n", "<|user|>\nsay fox</s>\n<|assistant|>\n"):
        assert tokenizer(text)["input_ids"] == own(text)["input_ids"]
    assert tokenizer.chat_template == own.chat_template
    np.testing.assert_allclose(logits(net, own), wanted, rtol=1e-4, atol=1e-5)

    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(FedtuneError, match=r"C107.*pip install 'fedtune\[gguf\]'"):
        fedtune.export(language, tmp_path / "other", program="gguf")
    assert not (tmp_path / "other").exists()


ARCHITECTURES = pytest.mark.parametrize(
    ("kind", "dtype"),
    [(kind, dtype) for kind in ("Mistral", "Qwen2", "Qwen3") for dtype in (torch.float32, torch.bfloat16)],
)


def drawn(kind: str, dtype: torch.dtype, place: Path, file: Path) -> tuple[Any, Any]:
    """A model of random values with its tokenizer, written as a GGUF file: biases of Qwen2's projections, norms
    of Qwen3's heads."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(place / "llama")
    width = 128 if kind == "Qwen3" else 8  # transformers' reader takes Qwen3's default, whatever a file says
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, head_dim=width,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False,
        initializer_range=0.2, sliding_window=None,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        net = getattr(transformers, f"{kind}ForCausalLM")(config).to(dtype)
        for value in net.parameters():  # biases and norms, too, which begin as zeros and ones
            value.data += 0.1 * torch.rand_like(value)
    gguf_file.write(net, tokenizer, file, "tiny")
    return net, tokenizer


@ARCHITECTURES
def test_other_architectures_come_back_from_a_gguf_file(
    kind: str, dtype: torch.dtype, place: Path, tmp_path: Path
) -> None:
    net, tokenizer = drawn(kind, dtype, place, tmp_path / "model.gguf")
    back = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="model.gguf", dtype=torch.float32
    )
    got = dict(back.named_parameters())
    assert all(torch.equal(value.float(), got[name]) for name, value in net.named_parameters())
    if dtype == torch.float32:
        np.testing.assert_allclose(logits(back, tokenizer), logits(net, tokenizer), rtol=1e-4, atol=1e-5)


def by_llama_cpp(file: Path, asked: str, tokens: int) -> tuple[list[int], np.ndarray, list[int]]:
    """What llama.cpp makes of a text: its tokens, the logits behind each, and what it goes on with greedily."""
    llama_cpp = pytest.importorskip(
        "llama_cpp", reason="pip install llama-cpp-python, which compiles llama.cpp"
    )
    exact = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32, "flash_attn": False}
    with closing(
        llama_cpp.Llama(str(file), n_ctx=64, n_threads=1, logits_all=True, verbose=False, **exact)
    ) as net:
        ids = net.tokenize(asked.encode(), add_bos=False, special=True)
        net.eval(ids)
        said = np.array(net.scores[: len(ids)])
        answer = net.generate(ids, temp=0.0, repeat_penalty=1.0)
        return ids, said, [next(answer) for _ in range(tokens)]


def require_llama_cpp_says(file: Path, net: Any, tokenizer: Any, tolerance: float) -> None:
    """Tokens, logits and a greedy answer of llama.cpp are those of transformers."""
    ids, said, answer = by_llama_cpp(file, ASKED, 12)
    assert ids == tokenizer(ASKED, add_special_tokens=False)["input_ids"]
    given = torch.tensor([ids])
    with torch.no_grad():
        want = net.eval()(given).logits[0].float().numpy()
        asked = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": None, "pad_token_id": 0}
        goes_on = net.generate(given, attention_mask=torch.ones_like(given), **asked)[0, len(ids) :].tolist()
    assert np.abs(said - want).max() <= tolerance * np.abs(want).max()
    assert answer == goes_on


@pytest.mark.slow
def test_llama_cpp_answers_as_the_merged_model(language: Path, tmp_path: Path) -> None:
    fedtune.export(language, tmp_path / "out", program="gguf")
    require_llama_cpp_says(tmp_path / "out" / "model.gguf", *fedtune.load(language), 1e-5)


@pytest.mark.slow
@ARCHITECTURES
def test_llama_cpp_runs_other_architectures(
    kind: str, dtype: torch.dtype, place: Path, tmp_path: Path
) -> None:
    net, tokenizer = drawn(kind, dtype, place, tmp_path / "model.gguf")
    # it rounds what goes into a product with a matrix in 16 bits
    require_llama_cpp_says(
        tmp_path / "model.gguf", net.float(), tokenizer, 1e-5 if dtype == torch.float32 else 2e-2
    )


def test_sentence_transformers_encodes_with_the_tuned_backbone(place: Path, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    run = trained(place, "sentences", model__pooling="mean", method__train__lr=0.05)
    fedtune.export(run, tmp_path / "out", program="sentence-transformers")
    said = SentenceTransformer(str(tmp_path / "out"), device="cpu").encode([ASKED, "a cat"])
    net, tokenizer = fedtune.load(run)
    batch = tokenizer([ASKED, "a cat"], return_tensors="pt", padding=True)
    with torch.no_grad():
        own = (
            net.get_base_model().base_model(**batch).last_hidden_state[:, 0].numpy()
        )  # pooled at every place
    np.testing.assert_allclose(said, own, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("program", "changes", "why"),
    [
        ("peft", {"method__adapter": {"kind": "bias"}}, "kind 'bias', which peft does not have"),
        ("peft", {"model__pooling": "mean"}, "reads the mean of the tokens"),
        ("gguf", {"model__pooling": "mean"}, "data.task = 'classify'"),
        ("vllm", {"model__pooling": "mean"}, "data.task = 'classify'"),
        ("sentence-transformers", {"method__adapter": {"kind": "bias"}}, "behind the model's pooler"),
    ],
)
def test_what_has_no_form_is_refused(
    program: str, changes: dict[str, Any], why: str, place: Path, tmp_path: Path
) -> None:
    name = "sentences" if "model__pooling" in changes else "bias"
    run = trained(place, name, method__train__lr=0.05, **changes)
    with pytest.raises(FedtuneError, match=rf"M306: found .*{why}"):
        fedtune.export(run, tmp_path / "out", program=program)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("adapter", "name", "why"),
    [
        ({"kind": "ia3"}, "", "kind 'ia3'"),
        ({"rank": 513}, "", "rank 513"),
        ({"dora": True}, "", "DoRA"),
        ({"modules_to_save": ("embed_tokens",)}, "", "modules_to_save"),
        ({}, "package:somebody/model.gguf", "which vLLM does not find"),
        ({"rank": 512}, "", ""),
    ],
)
def test_vllm_gets_what_it_can_serve(adapter: dict[str, Any], name: str, why: str, place: Path) -> None:
    base = load(ModelSettings(name=str(place / "llama"), device="cpu", threads=1), "instruct", (), 1)
    tunable = attach(base, adapter_of(**adapter), 1)
    base.name = name or base.name
    if not why:
        return refuse_vllm(tunable)
    with pytest.raises(FedtuneError, match=rf"M306: found .*{why}.*, for vllm"):
        refuse_vllm(tunable)
    return None


def test_the_cards_hold_figures_and_no_rows(place: Path, language: Path, tmp_path: Path) -> None:
    run = trained(place, "sentences", model__pooling="mean", method__train__lr=0.05)
    about = huggingface_hub.metadata_load(run / "adapter" / "README.md")
    result = json.loads((run / "result.json").read_text())
    figure = about["model-index"][0]["results"][0]["metrics"][0]
    assert figure == {"type": "accuracy", "value": round(result["federated"], 4)}
    assert about["pipeline_tag"] == "text-classification" and about["widget"][0]["text"]
    facts = json.loads((run / "data.json").read_text())
    assert facts["train"] + sum(c["held_out"] for c in facts["clients"]) + facts["test"] == 120
    card, page = (run / "adapter" / "README.md").read_text(), (run / "data.md").read_text()
    assert f"{facts['train']} that train at 4 clients" in card and "| client-0 |" in page
    for row in small.rows():
        assert row["text"] not in card + page

    (place / "llama" / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    fedtune.export(language, tmp_path / "out", program="peft")
    about = huggingface_hub.metadata_load(tmp_path / "out" / "README.md")
    assert about["license"] == "apache-2.0" and about["library_name"] == "peft"
    (place / "llama" / "README.md").unlink()

"""A model is read as its author meant it: padding, order of classes, positions, adapters beside it,
architectures."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T

from fedtune.errors import FedtuneError
from fedtune.hf.config import position_limit
from fedtune.model.base import Base, load
from fedtune.model.encode import encode
from fedtune.model.settings import ModelSettings
from tests import tiny

WIDE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}


def opened(folder: Path, task: str = "classify", labels: tuple[str, ...] = ("a", "b"), seed: int = 1) -> Base:
    return load(ModelSettings(name=str(folder), threads=1, device="cpu"), task, labels, seed)


def classifier(folder: Path, names: dict[int, str] | None, **changes: Any) -> Any:
    """A BERT that was saved as a classifier of two classes."""
    config = T.BertConfig.from_pretrained(tiny.bert(folder), **changes)
    config.num_labels = 2
    if names:
        config.id2label, config.label2id = names, {name: number for number, name in names.items()}
    torch.manual_seed(4)
    net = T.BertForSequenceClassification(config).eval()
    net.save_pretrained(folder)
    return net


# --- the order of classes ---


@pytest.mark.parametrize("asked", [("routine", "urgent"), ("urgent", "routine"), ("Routine", " URGENT")])
def test_a_head_of_the_same_classes_keeps_its_order(asked: tuple[str, ...], tmp_path: Path) -> None:
    net = classifier(tmp_path, {0: "urgent", 1: "routine"})
    base = opened(tmp_path, labels=asked)
    assert [label.strip().lower() for label in base.labels] == ["urgent", "routine"] and not any(
        "classifier" in name for name in base.fresh
    )
    assert torch.equal(base.net.classifier.weight, net.classifier.weight)
    assert list(base.net.config.id2label.values()) == list(base.labels)
    assert "order of classes counts" in base.notes[0]


def test_unnamed_classes_stand_for_whole_numbers(tmp_path: Path) -> None:
    net = classifier(tmp_path, None)
    assert torch.equal(opened(tmp_path, labels=("0", "1")).net.classifier.weight, net.classifier.weight)
    assert opened(tmp_path, labels=("1", "0")).labels == ("0", "1")


@pytest.mark.parametrize("labels", [("no", "yes"), ("no", "so", "yes"), ("urgent",)])
def test_a_head_of_other_classes_starts_fresh_from_the_seed_and_says_so(
    labels: tuple[str, ...], tmp_path: Path
) -> None:
    net = classifier(tmp_path, {0: "urgent", 1: "routine"})
    one, again, other = (opened(tmp_path, labels=labels, seed=seed) for seed in (1, 1, 2))
    assert {"classifier.weight", "classifier.bias"} <= one.fresh and "starts fresh" in one.notes[0]
    assert torch.equal(one.net.classifier.weight, again.net.classifier.weight) and not torch.equal(
        one.net.classifier.weight, other.net.classifier.weight
    )
    assert one.net.classifier.weight.shape != net.classifier.weight.shape or not torch.equal(
        one.net.classifier.weight, net.classifier.weight
    )
    assert one.fingerprint == other.fingerprint  # the fresh head is not part of what was pretrained


def test_a_regression_head_is_another_tasks(tmp_path: Path) -> None:
    classifier(tmp_path, {0: "a", 1: "b"}, problem_type="regression")
    base = opened(tmp_path)
    assert "classifier.weight" in base.fresh and base.net.config.problem_type is None


# --- padding ---


def generative(folder: Path, pad: int | None) -> Path:
    """A generative classifier whose tokenizer pads with </s> (id 1); the configuration says `pad`."""
    tiny.llama(folder)
    config = T.LlamaConfig.from_pretrained(
        folder, num_labels=2, id2label={0: "a", 1: "b"}, label2id={"a": 0, "b": 1}
    )
    config.pad_token_id = pad
    return tiny.save(T.LlamaForSequenceClassification, config, folder)


@pytest.mark.parametrize("pad", [None, -1, 1])
def test_one_padding_id_for_model_and_tokenizer(pad: int | None, tmp_path: Path) -> None:
    base = opened(generative(tmp_path, pad))
    assert base.net.config.pad_token_id == base.tokenizer.pad_token_id == 1
    encoded = encode([{"text": text, "label": "a"} for text in tiny.SENTENCES], base, max_length=48)
    batch = encoded.collate(range(len(encoded)))
    del batch["labels"]
    net = T.AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    net.config.pad_token_id = 1
    with torch.no_grad():
        alone = torch.cat(
            [
                net(**base.tokenizer(text, return_tensors="pt", return_token_type_ids=False)).logits
                for text in tiny.SENTENCES
            ]
        )
        torch.testing.assert_close(base.net(**batch).logits, alone, rtol=1e-4, atol=1e-5)


def test_two_padding_ids_of_which_the_model_reads_one_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FedtuneError, match=r"M303.*padding id 0 in config.json and 1 in the tokenizer"):
        opened(generative(tmp_path, 0))


def test_a_model_that_reads_the_last_place_is_padded_on_the_left(tmp_path: Path) -> None:
    tiny.bert(tmp_path)
    config = T.XLNetConfig(
        vocab_size=len(T.AutoTokenizer.from_pretrained(tmp_path)),
        d_model=32,
        n_layer=2,
        n_head=4,
        d_inner=64,
        pad_token_id=0,
        num_labels=2,
    )
    base = opened(tiny.save(T.XLNetForSequenceClassification, config, tmp_path))
    batch = encode(
        [{"text": text, "label": "a"} for text in ("the fox", "the red fox runs over")], base, max_length=16
    ).collate([0, 1])
    assert base.pad_side == "left" and batch["attention_mask"].tolist()[0] == [0, 0, 0, 1, 1, 1, 1]


def test_a_model_that_mixes_padding_in_is_refused(tmp_path: Path) -> None:
    tiny.bert(tmp_path)
    size = len(T.AutoTokenizer.from_pretrained(tmp_path))
    config = T.FNetConfig(
        vocab_size=size,
        **{k: v for k, v in WIDE.items() if k != "num_attention_heads"},
        max_position_embeddings=32,
        pad_token_id=0,
    )
    with pytest.raises(
        FedtuneError, match=r"M306.*output for a text changes when a longer one is in the same batch"
    ):
        opened(tiny.save(T.FNetForSequenceClassification, config, tmp_path))


def test_a_language_model_that_sees_the_future_is_refused(tmp_path: Path) -> None:
    tiny.bert(tmp_path)
    config = T.BertConfig.from_pretrained(tmp_path)
    tiny.save(T.BertLMHeadModel, config, tmp_path)
    with pytest.raises(FedtuneError, match=r"M306.*sees tokens after the one that it should predict"):
        opened(tmp_path, "causal-lm", ())
    config.is_decoder = True
    assert opened(tiny.save(T.BertLMHeadModel, config, tmp_path), "causal-lm", ()).pad_side == "right"


# --- positions, ids, files ---

PLACES = {  # places that a table of positions has for tokens, by configuration
    "roberta": (
        T.RobertaModel,
        T.RobertaConfig(vocab_size=40, **WIDE, max_position_embeddings=34, pad_token_id=1),
        32,
    ),
    "mpnet": (
        T.MPNetModel,
        T.MPNetConfig(vocab_size=40, **WIDE, max_position_embeddings=34, pad_token_id=1),
        32,
    ),
    "longformer": (
        T.LongformerModel,
        T.LongformerConfig(
            vocab_size=40, **WIDE, max_position_embeddings=34, attention_window=4, pad_token_id=0
        ),
        33,
    ),
    "bert": (T.BertModel, T.BertConfig(vocab_size=40, **WIDE, max_position_embeddings=34), 34),
    "gpt2": (T.GPT2Model, T.GPT2Config(vocab_size=40, n_embd=32, n_layer=1, n_head=4, n_positions=34), 34),
    "opt": (
        T.OPTModel,
        T.OPTConfig(
            vocab_size=40,
            hidden_size=32,
            ffn_dim=64,
            num_hidden_layers=1,
            num_attention_heads=4,
            max_position_embeddings=34,
            word_embed_proj_dim=32,
        ),
        34,
    ),
    "bart": (
        T.BartModel,
        T.BartConfig(
            vocab_size=40,
            d_model=32,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=32,
            decoder_ffn_dim=32,
            max_position_embeddings=34,
        ),
        34,
    ),
    "luke": (
        T.LukeModel,
        T.LukeConfig(
            vocab_size=40,
            entity_vocab_size=5,
            entity_emb_size=8,
            **WIDE,
            max_position_embeddings=34,
            pad_token_id=1,
        ),
        32,
    ),
    "llama": (T.LlamaModel, T.LlamaConfig(vocab_size=40, **WIDE), None),
    "t5": (T.T5EncoderModel, T.T5Config(vocab_size=40, d_model=32, d_ff=32, num_layers=1, num_heads=4), None),
}


@pytest.mark.parametrize("name", PLACES)
def test_a_table_of_positions_says_how_many_places_it_has(name: str) -> None:
    kind, config, places = PLACES[name]
    net = kind(config).eval()
    assert position_limit(net) == places
    if places and name not in ("bart", "luke", "opt"):
        ids = torch.full((1, places), 5)
        net(input_ids=ids)  # as many as it says
        with pytest.raises((IndexError, RuntimeError)):
            net(input_ids=torch.cat([ids, ids[:, :1]], 1))


def test_an_adapter_beside_the_model_is_refused(tmp_path: Path) -> None:
    tiny.bert(tmp_path)
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": "x"})
    )
    with pytest.raises(
        FedtuneError, match=r"M301.*adapter_config.json.*merge the adapter into its base first"
    ):
        opened(tmp_path)


def test_added_tokens_with_ids_behind_the_embeddings_are_refused(tmp_path: Path) -> None:
    tiny.bert(tmp_path)
    tokens = T.AutoTokenizer.from_pretrained(tmp_path)
    tokens.add_tokens(["brandnew"])
    tokens.save_pretrained(tmp_path)
    with pytest.raises(FedtuneError, match=r"M303.*ids up to"):
        opened(tmp_path)


def test_a_tokenizer_that_knows_almost_no_word_of_the_data_is_refused(tmp_path: Path) -> None:
    base = opened(tiny.bert(tmp_path))
    known, strange = "the red fox runs", "Zwölf Boxkämpfer jagen Viktor quer"
    encode([{"text": known, "label": "a"}, {"text": "fox " + strange[:5], "label": "b"}], base, max_length=16)
    with pytest.raises(FedtuneError, match=r"M303.*does not know 5 of 5 tokens"):
        encode([{"text": strange, "label": "a"}], base, max_length=16)


@pytest.mark.parametrize(
    ("config", "task", "words"),
    [
        (
            T.T5Config(vocab_size=40, d_model=32, d_ff=32, num_layers=1, num_heads=4),
            "instruct",
            r"M306.*'t5'.*",
        ),
        (
            T.WhisperConfig(vocab_size=40, d_model=32),
            "classify",
            r"M306.*'whisper' model.*with data.task = 'classify'",
        ),
        (
            T.ViTConfig(hidden_size=32),
            "classify",
            r"M306.*'vit' model.*data.task = 'image-classify' with this model",
        ),
        (T.BartConfig(vocab_size=40, d_model=32), "causal-lm", r"M306.*encoder-decoder 'bart'"),
    ],
)
def test_an_architecture_that_cannot_do_the_task_is_a_sentence(
    config: Any, task: str, words: str, tmp_path: Path
) -> None:
    shutil.copytree(tiny.bert(tmp_path / "bert"), tmp_path / "model")
    config.save_pretrained(tmp_path / "model")
    with pytest.raises(FedtuneError, match=words):
        opened(tmp_path / "model", task, ("a", "b") if "classify" in task else ())

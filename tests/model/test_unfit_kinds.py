"""Which layers an adapter finds, and kinds that cannot stand on a model: M306 from `attach` on, with the base
as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T
from torch import nn

from fedtune.errors import FedtuneError
from fedtune.model.adapters.layers import linear_layers
from fedtune.model.base import Base, load
from fedtune.model.blocks import is_encoder
from fedtune.model.settings import ModelSettings
from fedtune.model.tunable import attach
from tests import tiny
from tests.tables import adapter_of

BLOCK = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def opened(folder: Path, net: type, task: str = "causal-lm", **settings: Any) -> Base:
    """A tiny model of a configuration class, with the tokenizer that fits its task."""
    (tiny.llama if task == "causal-lm" else tiny.bert)(folder)
    tokens = T.AutoTokenizer.from_pretrained(folder)
    config = net.config_class(vocab_size=len(tokens), **settings)  # type: ignore[attr-defined]
    labels = ("a", "b") if task == "classify" else ()
    config.num_labels = max(len(labels), 1)
    return load(
        ModelSettings(name=str(tiny.save(net, config, folder)), threads=1, device="cpu"), task, labels, 1
    )


def test_subclasses_of_linear_are_linear_layers(tmp_path: Path) -> None:
    base = opened(tmp_path, T.FalconForCausalLM, **BLOCK, bos_token_id=0, eos_token_id=1)
    assert {name.rpartition(".")[2] for name in linear_layers(base)} == {
        "query_key_value",
        "dense",
        "dense_h_to_4h",
        "dense_4h_to_h",
    }
    assert {type(base.net.get_submodule(name)).__name__ for name in linear_layers(base)} == {"FalconLinear"}
    assert attach(base, adapter_of(rank=2), 0).trainable


def test_an_output_layer_that_is_never_called_is_no_target(workspace: Any) -> None:
    """torch's own attention reads the weights of its output layer; peft's wrapper there would never run."""
    base = workspace.load("encoder")
    base.net.bert.encoder.layer[0].extra = nn.MultiheadAttention(32, 4)
    assert not any("extra" in name for name in linear_layers(base))


UNFIT = {
    "electra, deep prompts": (
        T.ElectraForSequenceClassification,
        "classify",
        {**BLOCK, "embedding_size": 16},
        {"kind": "prompt", "deep": True},
    ),
    "falcon, prefix": (
        T.FalconForCausalLM,
        "causal-lm",
        {**BLOCK, "bos_token_id": 0, "eos_token_id": 1},
        {"kind": "prefix"},
    ),
    "gpt1, prefix": (
        T.OpenAIGPTLMHeadModel,
        "causal-lm",
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
        {"kind": "prefix"},
    ),
    "gpt1, bottleneck": (
        T.OpenAIGPTLMHeadModel,
        "causal-lm",
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
        {"kind": "adapter"},
    ),
}


@pytest.mark.parametrize("name", UNFIT)
def test_a_kind_that_does_not_fit_is_refused_at_once_and_the_base_is_as_before(
    name: str, tmp_path: Path
) -> None:
    net, task, settings, adapter = UNFIT[name]
    base = opened(tmp_path, net, task, **settings)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        before = base.net(input_ids=ids).logits
        with pytest.raises(
            FedtuneError, match=rf"M306: found kind '{adapter['kind']}' with a {net.__name__}"
        ):
            attach(base, adapter_of(**adapter), 0)
        assert base.attached is None and torch.equal(base.net(input_ids=ids).logits, before)


DECODERS = {
    "bert as a decoder": (
        T.BertForSequenceClassification,
        {**BLOCK, "intermediate_size": 64, "max_position_embeddings": 64, "is_decoder": True},
        True,
    ),
    "bert": (
        T.BertForSequenceClassification,
        {**BLOCK, "intermediate_size": 64, "max_position_embeddings": 64},
        False,
    ),
    "electra": (
        T.ElectraForSequenceClassification,
        {**BLOCK, "embedding_size": 32, "intermediate_size": 64, "max_position_embeddings": 64},
        False,
    ),
    "gpt2": (
        T.GPT2ForSequenceClassification,
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
        True,
    ),
}


@pytest.mark.parametrize("name", DECODERS)
def test_what_a_model_does_says_whether_it_is_a_decoder(name: str, tmp_path: Path) -> None:
    net, settings, causal = DECODERS[name]
    base = opened(tmp_path, net, "classify", **settings)
    assert base.causal is causal and is_encoder(base) is not causal

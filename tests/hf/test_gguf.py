"""GGUF files: read as their values say, once, and found again."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize, quantize
from tokenizers import Tokenizer

from fedtune.errors import FedtuneError
from fedtune.hf.config import locate
from fedtune.hf.gguf import cache
from fedtune.model.base import load
from fedtune.model.settings import ModelSettings
from tests import tiny

NAMES = {  # transformers' names -> GGUF's
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers.": "blk.",
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def written(folder: Path, file: Path) -> dict[str, np.ndarray]:
    """A tiny Llama's folder as a GGUF file in 8 bits; the values that it holds, by transformers' names."""
    net = load(ModelSettings(name=str(folder)), "causal-lm", (), 0).net
    config, tokens = net.config, Tokenizer.from_file(str(folder / "tokenizer.json"))
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    words = [tokens.id_to_token(number) for number in range(tokens.get_vocab_size())]
    words[words.index("<|system|>")] = "<|endoftext|>"  # which transformers would add
    writer.add_token_list(words)
    merges = json.loads(tokens.to_str())["model"]["merges"]
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in merges])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    held = {}
    for name, value in net.state_dict().items():
        short = name
        for ours, theirs in NAMES.items():
            short = short.replace(ours, theirs)
        array = value.float().numpy()
        if array.ndim == 1:
            writer.add_tensor(short, array)
            held[name] = array
            continue
        stored = permuted(array, name, config)
        packed = quantize(stored, gguf.GGMLQuantizationType.Q8_0)
        writer.add_tensor(short, packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        held[name] = dequantize(packed, gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return held


def permuted(value: np.ndarray, name: str, config: object) -> np.ndarray:
    """llama.cpp keeps a head's rotary pairs side by side, transformers half a head apart."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}  # type: ignore[attr-defined]
    for part, count in heads.items():
        if part in name:
            rows = value.reshape(count, 2, value.shape[0] // count // 2, *value.shape[1:])
            return np.ascontiguousarray(rows.swapaxes(1, 2).reshape(value.shape))
    return value


def test_a_file_is_read_as_its_values_say_and_found_again(tmp_path: Path) -> None:
    held = written(tiny.llama(tmp_path / "model"), tmp_path / "tiny.gguf")
    place = Path(locate(str(tmp_path / "tiny.gguf")))
    assert place.parent == cache() and {"config.json", "tokenizer.json"} <= {p.name for p in place.iterdir()}
    net = load(ModelSettings(name=str(tmp_path / "tiny.gguf")), "causal-lm", (), 0).net
    assert {value.dtype for value in net.state_dict().values()} == {torch.float32}
    for name in ("model.embed_tokens.weight", "model.layers.0.mlp.down_proj.weight", "model.norm.weight"):
        np.testing.assert_array_equal(net.state_dict()[name].numpy(), held[name])
    before = {p: p.stat().st_mtime_ns for p in place.iterdir()}
    (tmp_path / "tiny.gguf").rename(tmp_path / "other.GGUF")
    assert Path(locate(str(tmp_path / "other.GGUF"))) == place  # by content, whatever the name
    assert {p: p.stat().st_mtime_ns for p in place.iterdir()} == before


@pytest.mark.parametrize(
    ("content", "why"),
    [(None, "cannot be read"), (b"PK\x03\x04", "does not begin"), (b"GGUF" + bytes(64), "no usable model")],
)
def test_what_is_no_model_is_one_sentence_and_leaves_nothing(
    tmp_path: Path, content: bytes | None, why: str
) -> None:
    file = tmp_path / "broken.gguf"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(FedtuneError, match=f"M301: .*{why}"):
        locate(str(file))
    assert not cache().exists() or not list(cache().iterdir())

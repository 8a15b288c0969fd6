"""A merged language model as one GGUF file, for llama.cpp and what is built on it.

Names, fields and the order of rotary pairs are those of llama.cpp's own converter (convert_hf_to_gguf.py);
the package gguf, which belongs to llama.cpp, knows them and writes the file.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from fedtune.errors import FedtuneError
from fedtune.extras import require

ARCHITECTURES = {  # transformers' model_type -> GGUF's architecture
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
}
NORMAL, CONTROL, USER, UNUSED = 1, 3, 4, 5  # gguf.TokenType


def refuse(net: Any, tokenizer: Any) -> None:
    """Raises M306 for an architecture, rotary scaling or tokenizer that is not written here."""
    kind, config = net.config.model_type, net.config
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    why = ""
    if kind not in ARCHITECTURES:
        why = f"a model of type '{kind}'"
    elif rope != "default":
        why = f"rotary positions that are scaled by '{rope}'"
    elif kind == "mistral" and getattr(config, "sliding_window", None):
        why = "a sliding window of attention"
    elif not pre_tokenizer(kind, tokenizer):
        why = "a tokenizer that is not one of byte pairs that llama.cpp knows"
    if why:
        known = ", ".join(sorted(ARCHITECTURES))
        raise FedtuneError(
            "M306",
            f"{why}, for GGUF",
            f"one of {known} with byte pairs",
            "export it with --for merged, and convert that folder with llama.cpp's convert_hf_to_gguf.py",
        )


def write(net: Any, tokenizer: Any, file: Path, name: str) -> None:
    """Write a causal language model and its tokenizer. Matrices keep the model's type, vectors are float32.
    Raises M306, C107 (no package gguf)."""
    gguf = require("gguf", "gguf", "export --for gguf")
    refuse(net, tokenizer)
    architecture = ARCHITECTURES[net.config.model_type]
    writer = gguf.GGUFWriter(str(file), architecture)
    writer.add_name(name)
    write_sizes(writer, net.config)
    write_tokenizer(writer, net.config, tokenizer)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], net.config.num_hidden_layers)
    for path, value in tensors(net):
        found = names.get_name(path, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise FedtuneError(
                "M306", f"a tensor '{path}', for GGUF", "those of its architecture", "use --for merged"
            )
        add_tensor(gguf, writer, found, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_sizes(writer: Any, config: Any) -> None:
    heads = config.num_attention_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(getattr(config, "num_key_value_heads", None) or heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    rope = getattr(config, "rope_parameters", None) or {}
    writer.add_rope_freq_base(float(rope.get("rope_theta") or 10000.0))


def tensors(net: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor by its path; of an output layer that is the embedding, the embedding alone."""
    tied = bool(net.config.tie_word_embeddings)
    heads = net.config.num_attention_heads
    for path, value in net.state_dict().items():
        if tied and path == "lm_head.weight":
            continue
        if ARCHITECTURES[net.config.model_type] == "llama":
            if ".q_proj." in path:
                value = interleaved(value, heads)
            elif ".k_proj." in path:
                value = interleaved(value, getattr(net.config, "num_key_value_heads", None) or heads)
        yield path, value


def interleaved(value: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a query or key projection, (heads * width, ...), with the two of each rotary pair side by side,
    as llama.cpp turns them; transformers has them half a head apart."""
    width = value.shape[0] // heads
    return value.reshape(heads, 2, width // 2, *value.shape[1:]).swapaxes(1, 2).reshape(value.shape)


def add_tensor(gguf: Any, writer: Any, name: str, value: torch.Tensor) -> None:
    value = value.detach().cpu().contiguous()
    if value.ndim == 1 or value.dtype == torch.float32:
        writer.add_tensor(name, value.float().numpy())
    elif value.dtype == torch.float16:
        writer.add_tensor(name, value.numpy())
    else:  # numpy has no bfloat16: its bytes, with their type
        raw = value.to(torch.bfloat16).view(torch.uint8).numpy()
        writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)


def write_tokenizer(writer: Any, config: Any, tokenizer: Any) -> None:
    """Byte pairs as llama.cpp has them: the tokens in the order of their ids, their types, and the merges."""
    known = json.loads(tokenizer.backend_tokenizer.to_str())
    by_id = {number: token for token, number in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    tokens, kinds = [], []
    for number in range(config.vocab_size):
        tokens.append(by_id.get(number, f"[PAD{number}]"))
        if number not in by_id:
            kinds.append(UNUSED)
        elif number in added:
            kinds.append(CONTROL if added[number].special else USER)
        else:
            kinds.append(NORMAL)
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in known["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer(config.model_type, tokenizer))
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    for add, number in (
        (writer.add_bos_token_id, tokenizer.bos_token_id),
        (writer.add_eos_token_id, tokenizer.eos_token_id),
        (writer.add_pad_token_id, tokenizer.pad_token_id),
        (writer.add_unk_token_id, tokenizer.unk_token_id),
    ):
        if number is not None:
            add(number)
    writer.add_add_bos_token(tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id])
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def pre_tokenizer(kind: str, tokenizer: Any) -> str:
    """llama.cpp's name for how a text is cut before its byte pairs are merged; "": not known."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    known = json.loads(backend.to_str()) if backend is not None else {}
    if known.get("model", {}).get("type") != "BPE":
        return ""
    before = known.get("pre_tokenizer") or {}
    steps = before.get("pretokenizers", [before])
    types = [step.get("type") for step in steps]
    patterns = [step["pattern"].get("Regex", "") for step in steps if step.get("type") == "Split"]
    if types == ["ByteLevel"] and steps[0].get("use_regex", True):
        return "gpt-2"
    if types == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
        return "smollm"
    if types == ["Split", "ByteLevel"] and patterns and "{1,3}" in patterns[0]:
        return "llama-bpe"
    if types == ["Split", "ByteLevel"] and kind in ("qwen2", "qwen3"):
        return "qwen2"
    return ""

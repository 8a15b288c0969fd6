"""Tiny networks of many families, random weights, and batches with padding for them."""

from __future__ import annotations

from typing import Any

import torch
import transformers as T

VOCABULARY, WIDTH, LAYERS, LABELS = 97, 32, 6, 5
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
}
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_labels": LABELS}
DECODER = SIZES | TOKENS | {"intermediate_size": 64, "num_key_value_heads": 2, "max_position_embeddings": 128}
ENCODER = SIZES | STILL | {"intermediate_size": 64, "pad_token_id": 0}
IMAGE = STILL | {
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 16,
    "patch_size": 4,
}
DINO = {name: value for name, value in IMAGE.items() if name != "intermediate_size"}
SLIDING = {"head_dim": 8, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2}
GEMMA = {"head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8}
MOE = {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
NEOX = SIZES | TOKENS | {"intermediate_size": 64, "max_position_embeddings": 128}
OPT = (
    SIZES
    | TOKENS
    | {"ffn_dim": 64, "max_position_embeddings": 128, "dropout": 0.0, "word_embed_proj_dim": WIDTH}
)
FALCON = SIZES | TOKENS
MODERN = (
    SIZES
    | TOKENS
    | {
        "intermediate_size": 64,
        "num_labels": LABELS,
        "cls_token_id": 1,
        "sep_token_id": 2,
        "local_attention": 6,
    }
)
GPT2 = TOKENS | {
    "vocab_size": VOCABULARY,
    "n_embd": WIDTH,
    "n_layer": LAYERS,
    "n_head": 4,
    "n_positions": 128,
}
GPT2 |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
BLOOM = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "n_layer": LAYERS,
    "n_head": 4,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "pad_token_id": 0,
}
DISTIL = {
    "vocab_size": VOCABULARY,
    "dim": WIDTH,
    "hidden_dim": 64,
    "n_layers": LAYERS,
    "n_heads": 4,
    "num_labels": LABELS,
}
DISTIL |= {"dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0}

# name -> (kind of model, name of its class, name of its configuration, settings)
FAMILIES: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "llama": ("lm", "LlamaForCausalLM", "LlamaConfig", DECODER),
    "qwen3 sliding": ("lm", "Qwen3ForCausalLM", "Qwen3Config", DECODER | SLIDING),
    "gpt2": ("lm", "GPT2LMHeadModel", "GPT2Config", GPT2),
    "bert": ("text", "BertForSequenceClassification", "BertConfig", ENCODER),
    "vit": ("image", "ViTForImageClassification", "ViTConfig", IMAGE),
    "llama classifier": (
        "last",
        "LlamaForSequenceClassification",
        "LlamaConfig",
        DECODER | {"num_labels": LABELS},
    ),
    "mistral": ("lm", "MistralForCausalLM", "MistralConfig", DECODER | {"sliding_window": 8}),
    "qwen2": ("lm", "Qwen2ForCausalLM", "Qwen2Config", DECODER),
    "gemma2": ("lm", "Gemma2ForCausalLM", "Gemma2Config", DECODER | GEMMA),
    "gemma3": ("lm", "Gemma3ForCausalLM", "Gemma3TextConfig", DECODER | GEMMA),
    "phi3": ("lm", "Phi3ForCausalLM", "Phi3Config", DECODER),
    "olmo2": ("lm", "Olmo2ForCausalLM", "Olmo2Config", DECODER),
    "gpt_neox": ("lm", "GPTNeoXForCausalLM", "GPTNeoXConfig", NEOX),
    "opt": ("lm", "OPTForCausalLM", "OPTConfig", OPT),
    "bloom": ("lm", "BloomForCausalLM", "BloomConfig", BLOOM),
    "falcon": ("lm", "FalconForCausalLM", "FalconConfig", FALCON),
    "qwen3_moe": ("lm", "Qwen3MoeForCausalLM", "Qwen3MoeConfig", DECODER | MOE),
    "roberta": ("text", "RobertaForSequenceClassification", "RobertaConfig", ENCODER),
    "distilbert": ("text", "DistilBertForSequenceClassification", "DistilBertConfig", DISTIL),
    "electra": (
        "text",
        "ElectraForSequenceClassification",
        "ElectraConfig",
        ENCODER | {"embedding_size": WIDTH},
    ),
    "modernbert": ("text", "ModernBertForSequenceClassification", "ModernBertConfig", MODERN),
    "deit": ("image", "DeiTForImageClassification", "DeiTConfig", IMAGE),
    "dinov2": ("image", "Dinov2ForImageClassification", "Dinov2Config", DINO),
    "beit": ("image", "BeitForImageClassification", "BeitConfig", IMAGE),
}
NAMED = ["llama", "qwen3 sliding", "gpt2", "bert", "vit", "llama classifier"]


def make(name: str, **changes: Any) -> Any:
    """A network in eval mode; every parameter is moved off its symmetric start."""
    _, model, config, settings = FAMILIES[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        net = getattr(T, model)(getattr(T, config)(**(settings | changes))).eval()
        with torch.no_grad():
            for value in net.parameters():
                value.add_(torch.randn_like(value) * 0.05)
    return net


def batch(name: str, rows: int = 3, tokens: int = 12) -> dict[str, torch.Tensor]:
    """Inputs with labels; the first and the last text are shorter than the others."""
    kind = FAMILIES[name][0]
    draw = torch.Generator().manual_seed(5)
    classes = torch.arange(rows) % LABELS
    if kind == "image":
        return {"pixel_values": torch.randn(rows, 3, 16, 16, generator=draw), "labels": classes}
    ids = torch.randint(3, VOCABULARY, (rows, tokens), generator=draw)
    mask = torch.ones(rows, tokens, dtype=torch.long)
    mask[0, -4:] = 0
    mask[-1, -1:] = 0
    ids[mask == 0] = 0
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": ids.masked_fill(mask == 0, -100) if kind == "lm" else classes,
    }

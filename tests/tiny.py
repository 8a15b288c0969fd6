"""Tiny real models with tokenizers, made on the spot: random weights, no network."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

SENTENCES = [
    "the red fox runs over the green hill",
    "a small boat sails on the blue sea",
    "she reads an old book by the fire",
    "he plays a slow song on the piano",
    "rain falls on the roof of the house",
    "the cat sleeps while the dog barks",
    "user assistant system question answer yes no",
]
CHAT = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


def llama(folder: Path, tie: bool = False, chat: bool = True) -> Path:
    """A causal language model: 2 blocks of width 32, byte-level BPE of 300 tokens, context 64."""
    tokenizer = byte_pairs(["<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>"])
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", model_max_length=64
    )
    if chat:
        fast.chat_template = CHAT
    fast.save_pretrained(folder)
    config = transformers.LlamaConfig(
        vocab_size=len(fast),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
        tie_word_embeddings=tie,
        bos_token_id=0,
        eos_token_id=1,
    )
    return save(transformers.LlamaForCausalLM, config, folder)


def byte_pairs(special: list[str]) -> Tokenizer:
    """Byte-level BPE of 300 tokens, the special ones first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        SENTENCES,
        trainers.BpeTrainer(
            vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        ),
    )
    return tokenizer


def bert(folder: Path, dropout: float = 0.0) -> Path:
    """An encoder without a classifier: 2 blocks of width 32, one token a word, context 32."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(
        SENTENCES, trainers.WordLevelTrainer(special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]"])
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=32,
    )
    fast.save_pretrained(folder)
    config = transformers.BertConfig(
        vocab_size=len(fast),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
        initializer_range=0.2,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        pad_token_id=0,
    )
    return save(transformers.BertModel, config, folder)


def vit(folder: Path) -> Path:
    """An image encoder: 2 blocks of width 32, images of 8 x 8 in patches of 4."""
    transformers.utils.logging.set_verbosity_error()
    transformers.ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(folder)
    config = transformers.ViTConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=8,
        patch_size=4,
        initializer_range=0.2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return save(transformers.ViTModel, config, folder)


def save(kind: type, config: transformers.PretrainedConfig, folder: Path) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformers.utils.logging.disable_progress_bar()
        kind(config).save_pretrained(folder)
    return folder


def texts(count: int = 6) -> list[dict[str, object]]:
    """Rows with a text and one of the classes a and b, in turns."""
    return [{"text": SENTENCES[i % 6], "label": "ab"[i % 2]} for i in range(count)]


def images(count: int = 6) -> list[dict[str, object]]:
    """Rows with a grey image of noise, 10 x 9, and one of the classes a and b, in turns."""
    draw = np.random.default_rng(0)
    return [
        {"image": draw.integers(0, 256, (10, 9), dtype=np.uint8), "label": "ab"[i % 2]} for i in range(count)
    ]

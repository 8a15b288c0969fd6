"""A tiny random model of a family, with its tokenizer or image processor, as a folder that fedtune loads like
any other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers as T
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

from tests import tiny
from tests.models.families import IMAGE_SIZE, SAVED, Family


def make(family: Family, folder: Path) -> Path:
    """Config, weights and tokenizer of a family, from one seed."""
    T.utils.logging.set_verbosity_error()
    T.utils.logging.disable_progress_bar()
    more: dict[str, Any] = {}
    if family.side == "image":
        side = family.config.get("image_size", IMAGE_SIZE)
        T.ViTImageProcessor(size={"height": side, "width": side}).save_pretrained(folder)
    else:
        tokenizer = words(family) if family.side == "encoder" else pieces(family)
        tokenizer.save_pretrained(folder)
        # a few rows to spare, as real models have: some tokenizer classes add a token of their own
        more = {"vocab_size": len(tokenizer) + 4, "pad_token_id": tokenizer.pad_token_id}
        if family.side != "encoder":
            more |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
        if family.side == "both":
            more |= {"decoder_start_token_id": tokenizer.pad_token_id}
    config = T.AutoConfig.for_model(family.kind, **(family.config | more))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        SAVED[family.side].from_config(config).save_pretrained(folder)
    return folder


def words(family: Family) -> Any:
    """One token a word; the class token in front, or behind as XLNet has it, which also pads in front."""
    special = (
        ["[CLS]", "[PAD]", "[SEP]", "[UNK]", "[MASK]"]
        if family.pad
        else ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    )
    made = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.train_from_iterator(
        tiny.SENTENCES, trainers.WordLevelTrainer(special_tokens=special, show_progress=False)
    )
    ends = [(word, special.index(word)) for word in ("[CLS]", "[SEP]")]
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]" if family.front else "$A [SEP] [CLS]", special_tokens=ends
    )
    names = {
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "mask_token": "[MASK]",
    }
    side = "right" if family.front else "left"
    return T.PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=32, padding_side=side, **names)


def pieces(family: Family) -> Any:
    """Byte-level pairs with a padding token of its own and a chat template."""
    special = ["<s>", "<pad>", "</s>"] if family.pad else ["<pad>", "<s>", "</s>"]
    made = tiny.byte_pairs([*special, "<|system|>", "<|user|>", "<|assistant|>"])
    if family.side == "both":
        made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    fast = T.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=64
    )
    fast.chat_template = tiny.CHAT
    return fast

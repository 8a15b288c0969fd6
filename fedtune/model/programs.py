"""Exports for other programs: what each of them reads, and why a model has no form there.

peft                   an adapter that PeftModel.from_pretrained loads
merged                 the whole model, for transformers
gguf                   one file of a merged language model, for llama.cpp and what is built on it
vllm                   a LoRA adapter that vLLM serves on its base (--enable-lora)
sentence-transformers  a tuned sentence encoder, without the task head
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fedtune.errors import FedtuneError
from fedtune.hf.config import PACKAGE
from fedtune.hf.gguf import is_gguf
from fedtune.model import gguf_file
from fedtune.model.export import is_stock, merged_net, save_adapter, save_merged
from fedtune.model.tunable import TunableModel
from fedtune.types import LM_TASKS

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what its --max-lora-rank may be
MODES = {  # our pooling in sentence-transformers' words
    "mean": "pooling_mode_mean_tokens",
    "cls": "pooling_mode_cls_token",
    "last": "pooling_mode_lasttoken",
}


@dataclass(frozen=True)
class Program:
    """How a program's folder is made.

    form    of the method's, which has to be among them
    refuse  raises M306 with the reason
    write   the tunable model, a folder that is to be made, and the card
    """

    form: str
    refuse: Callable[[TunableModel], None]
    write: Callable[[TunableModel, Path, str], None]


def no_form(program: str, why: str, expected: str, do: str) -> FedtuneError:
    return FedtuneError("M306", f"{why}, for {program}", expected, do)


def refuse_peft(tunable: TunableModel) -> None:
    if not is_stock(tunable):
        raise no_form(
            "peft",
            f"kind '{tunable.kind}', which peft does not have",
            "lora, ia3, prefix, p-tuning or peft's prompts",
            "export it with --as adapter, whose load.py needs nothing of fedtune",
        )
    if tunable.base.pooling != "own":
        raise no_form(
            "peft",
            f"a head that reads the {tunable.base.pooling} of the tokens, which the stock class does not",
            "model.pooling = 'pooler'",
            "export it with --as adapter, whose load.py does, or with --for sentence-transformers",
        )


def refuse_merged(tunable: TunableModel) -> None:
    """Merging says itself which kinds it refuses."""


def refuse_gguf(tunable: TunableModel) -> None:
    if tunable.base.task not in LM_TASKS:
        raise no_form(
            "gguf", f"data.task = '{tunable.base.task}'", "a language model", "export it with --for merged"
        )
    gguf_file.refuse(tunable.base.net, tunable.base.tokenizer)


def refuse_vllm(tunable: TunableModel) -> None:
    settings, base = tunable.settings, tunable.base
    why = ""
    if base.task not in LM_TASKS:
        why = f"data.task = '{base.task}'"
    elif settings is None or settings.kind != "lora":
        why = f"kind '{tunable.kind}'"
    elif settings.dora or settings.modules_to_save:  # type: ignore[attr-defined]
        why = "DoRA" if settings.dora else "modules_to_save"  # type: ignore[attr-defined]
    elif rank_of(tunable) > VLLM_RANKS[-1]:
        why = f"rank {rank_of(tunable)}"
    elif is_gguf(base.name) or base.name.startswith(PACKAGE):
        why = f"the base '{base.name}', which vLLM does not find by that name"
    if why:
        expected = f"a language model with plain LoRA of rank {VLLM_RANKS[-1]} or less"
        raise no_form("vllm", why, expected, "export it with --for merged, which vLLM serves as a model")


def rank_of(tunable: TunableModel) -> int:
    """The largest rank of a LoRA adapter as it stands, which need not be the recipe's."""
    return max(int(value.shape[0]) for name, value in tunable.named.items() if "lora_A" in name)


def refuse_sentences(tunable: TunableModel) -> None:
    base = tunable.base
    if base.task != "classify" or base.pooling not in MODES:
        found = (
            f"data.task = '{base.task}'"
            if base.task != "classify"
            else "a task head behind the model's pooler"
        )
        raise no_form(
            "sentence-transformers",
            found,
            f"a classifier whose model.pooling is one of {', '.join(MODES)}",
            "export it with --for merged",
        )


def write_peft(tunable: TunableModel, folder: Path, card: str) -> None:
    save_adapter(tunable, folder, tunable.base.name, card)


def write_merged(tunable: TunableModel, folder: Path, card: str) -> None:
    save_merged(tunable, folder, card)


def write_gguf(tunable: TunableModel, folder: Path, card: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    name = Path(tunable.base.name).stem or "model"
    gguf_file.write(merged_net(tunable), tunable.base.tokenizer, folder / "model.gguf", f"{name} tuned")
    lines = ["## Use", "", "```sh", "llama-cli -m model.gguf -cnv", "```", ""]
    (folder / "README.md").write_text(card + "\n" + "\n".join(lines))


def write_vllm(tunable: TunableModel, folder: Path, card: str) -> None:
    save_adapter(tunable, folder, tunable.base.name, card)
    most = next(rank for rank in VLLM_RANKS if rank >= rank_of(tunable))
    told = (
        f"vllm serve {tunable.base.name} --enable-lora --max-lora-rank {most} --lora-modules tuned=$PWD\n"
        "# requests then name the model `tuned`"
    )
    readme = folder / "README.md"
    readme.write_text(readme.read_text() + f"\nWith vLLM, in this folder:\n\n```sh\n{told}\n```\n")


def write_sentences(tunable: TunableModel, folder: Path, card: str) -> None:
    """A folder as sentence-transformers has them: the backbone, and the pooling beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    backbone = merged_net(tunable).base_model
    with torch.no_grad():
        backbone.save_pretrained(str(folder))
    tunable.base.tokenizer.save_pretrained(str(folder))
    (folder / "1_Pooling").mkdir()
    own = "sentence_transformers.models."
    parts = [("", own + "Transformer"), ("1_Pooling", own + "Pooling")]
    files: dict[str, Any] = {
        "modules.json": [
            {"idx": number, "name": str(number), "path": path, "type": kind}
            for number, (path, kind) in enumerate(parts)
        ],
        "1_Pooling/config.json": {"word_embedding_dimension": backbone.config.hidden_size}
        | {mode: mode == MODES[tunable.base.pooling] for mode in MODES.values()},
        "sentence_bert_config.json": {"max_seq_length": tunable.base.context, "do_lower_case": False},
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    lines = ["from sentence_transformers import SentenceTransformer", "", 'model = SentenceTransformer(".")']
    use = [
        "## Use",
        "",
        "In this folder:",
        "",
        "```python",
        *lines,
        'vectors = model.encode(["a text"])',
        "```",
    ]
    (folder / "README.md").write_text(card + "\n" + "\n".join(use) + "\n")


PROGRAMS = {
    "peft": Program("adapter", refuse_peft, write_peft),
    "merged": Program("merged", refuse_merged, write_merged),
    "gguf": Program("merged", refuse_gguf, write_gguf),
    "vllm": Program("adapter", refuse_vllm, write_vllm),
    "sentence-transformers": Program("merged", refuse_sentences, write_sentences),
}

"""What a card says about loading: lines of Python that work as they stand, in the exported folder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedtune.types import LM_TASKS

AUTO = {
    "classify": "AutoModelForSequenceClassification",
    "causal-lm": "AutoModelForCausalLM",
    "instruct": "AutoModelForCausalLM",
    "preference": "AutoModelForCausalLM",
    "image-classify": "AutoModelForImageClassification",
}


POOLED = {"mean": "mean of all tokens", "cls": "first token itself", "last": "last token"}


def usage(form: str, about: Mapping[str, Any]) -> str:
    """The section "Use" of a card. `form`: stock (peft loads it), script (load.py beside it does) or merged;
    `about` as in fedtune.json."""
    task, auto = str(about["task"]), AUTO[str(about["task"])]
    reader = "AutoImageProcessor" if task == "image-classify" else "AutoTokenizer"
    if form == "script":
        pooled = about.get("pooling", "own")
        why = (
            [f"# the task head reads the {POOLED[pooled]}, which the stock class does not"]
            if pooled != "own"
            else []
        )
        lines = [
            *why,
            "from load import load  # load.py in this folder: needs nothing of fedtune",
            "",
            "model, tokenizer = load()",
        ]
    elif form == "merged":
        lines = [
            f"from transformers import {auto}, {reader}",
            "",
            f'model = {auto}.from_pretrained(".")',
            f'tokenizer = {reader}.from_pretrained(".")',
        ]
    else:
        lines = [
            *imports_of(str(about["base"])),
            "from peft import PeftModel",
            f"from transformers import {auto}, {reader}",
            "",
            f"base = {base_of(str(about['base']))}",
            *labels_of(task, list(about["labels"])),
            f"model = {auto}.from_pretrained(base{', **classes' if task not in LM_TASKS else ''})",
            f'tokenizer = {reader}.from_pretrained(".")',
            *(["model.config.pad_token_id = tokenizer.pad_token_id"] if task != "image-classify" else []),
            'model = PeftModel.from_pretrained(model, ".").eval()',
            *one_line(task, about),
        ]
    return "\n".join(["## Use", "", "In this folder:", "", "```python", *lines, "```", ""])


def one_line(task: str, about: Mapping[str, Any]) -> list[str]:
    """peft's own shorthand, where it knows the task and finds the base by its name."""
    if task == "image-classify" or str(about["base"]).startswith("package:"):
        return []
    words = f'(".", num_labels={len(about["labels"])})' if about["labels"] else '(".")'
    return [f"# in one line: peft.{AUTO[task].replace('AutoModel', 'AutoPeftModel')}.from_pretrained{words}"]


def imports_of(base: str) -> list[str]:
    return (
        ["from importlib.util import find_spec", "from pathlib import Path", ""]
        if base.startswith("package:")
        else []
    )


def base_of(base: str) -> str:
    """An expression for the base model's place."""
    if not base.startswith("package:"):
        return repr(base)
    package, _, folder = base.removeprefix("package:").partition("/")
    return f"Path(next(iter(find_spec({package!r}).submodule_search_locations))) / {folder!r}"


def labels_of(task: str, labels: list[str]) -> list[str]:
    if task in LM_TASKS:
        return []
    names = dict(enumerate(labels))
    return [
        f'classes = {{"num_labels": {len(labels)}, "id2label": {names!r}, "ignore_mismatched_sizes": True}}'
    ]

"""Adapters brought to one set of tensors, so that they can be merged: pairs that one lacks are zero there,
all else must agree.

A pair is an addition to the base, so an adapter without it adds zero. What a file holds whole (a head, an
embedding table, a trained
bias, rows of single tokens) stands in the base's place: an adapter without it uses the base's own values,
which are not zero and not
here. Rows of tokens are averaged token by token, never row by row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from fedtune.errors import FedtuneError
from fedtune.model.lora_files import BIAS, EMBEDDING, PREFIX, Expert, factor

# rows of single tokens, whole, in the order of trainable_token_indices
ROWS = ".token_adapter.trainable_tokens_delta"
FROZEN = ".base_layer.weight"  # peft saves the table of an adapted embedding too, untrained
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
WHERE = (
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
)  # how peft says which layers have pairs
Vocabulary = Mapping[int, str]


def aligned(experts: Sequence[Expert]) -> tuple[list[Expert], list[str]]:
    """The adapters with the same tensors each, and what is to be said of it. Raises M303, M304, M305."""
    for other in experts[1:]:
        check_settings(experts[0], other)
    vocabularies = [vocabulary_of(expert) for expert in experts]
    for other, words in zip(experts[1:], vocabularies[1:], strict=True):
        check_words(experts[0], other, vocabularies[0], words)
    ordered = [experts[0], *(in_order(experts[0], other, vocabularies[0]) for other in experts[1:])]
    filled = [with_frozen(expert, ordered) for expert in ordered]
    for other in filled[1:]:
        check_whole(filled[0], other)
    return with_zeros(filled)


def check_settings(one: Expert, other: Expert) -> None:
    """Raises M304 for other labels, M305 for another task or another stack of layers."""
    if one.about and other.about and one.about.get("labels") != other.about.get("labels"):
        found = f"label set {str(other.about.get('labels'))[:120]} of '{other.path}'"
        raise FedtuneError(
            "M304",
            found,
            f"{str(one.about.get('labels'))[:120]}, that of '{one.path}'",
            "merge adapters of one label set",
        )
    for name in ("task_type", "layer_replication"):
        first, second = one.config.get(name), other.config.get(name)
        open_ended = name == "task_type" and not (first and second)  # what was not told can be either
        if (first or None) != (second or None) and not open_ended:
            raise FedtuneError(
                "M305",
                f"{name} = {second} in '{other.path}'",
                f"{first}, as in '{one.path}'",
                "leave one of them out",
            )


# --- tokens ---


def vocabulary_of(expert: Expert) -> Vocabulary | None:
    """Token by id, by the tokenizer in the adapter's folder; None where there is none."""
    if not any((expert.path / name).exists() for name in TOKENIZER):
        return None
    import transformers

    try:
        words = transformers.AutoTokenizer.from_pretrained(
            str(expert.path), trust_remote_code=False
        ).get_vocab()
    # tokenizers raise what they like; without one, nothing is known of the words, which is a case of its own
    except Exception:
        return None
    return {number: word for word, number in words.items()}


def check_words(one: Expert, other: Expert, first: Vocabulary | None, second: Vocabulary | None) -> None:
    """One id must be one token in both. Tokens that only one knows matter where tables of tokens are merged.
    Raises M303."""
    if first is None or second is None or one.sha256 == other.sha256:
        return
    if odd := sorted(number for number in first.keys() & second.keys() if first[number] != second[number]):
        found = (
            f"{odd[0]} for '{second[odd[0]]}' in '{other.path}' and for '{first[odd[0]]}' in '{one.path}' "
            f"({len(odd)} ids differ)"
        )
        raise FedtuneError(
            "M303",
            f"the token id {found}",
            "one tokenizer for all adapters",
            "merge adapters of one tokenizer",
        )
    only = sorted(first.keys() ^ second.keys())
    if only and any(holds_words(expert, min(len(first), len(second))) for expert in (one, other)):
        has, lacks, words = (one, other, first) if only[0] in first else (other, one, second)
        some = ", ".join(f"'{words[number]}'" for number in only[:3] if number in words)
        found = (
            f"trained embeddings, and the tokens {some} ({len(only)} in all) in '{has.path}' but not in "
            f"'{lacks.path}'"
        )
        raise FedtuneError(
            "M303",
            found,
            "the same tokens in every adapter",
            "train them with one tokenizer, or leave one of them out",
        )


def holds_words(expert: Expert, count: int) -> bool:
    """Whether an adapter changes what single tokens are embedded as: pairs, rows or a whole table of an
    embedding."""
    tables = any(
        name.endswith(ROWS) or (value.ndim == 2 and value.shape[0] >= count)
        for name, value in expert.plain.items()
    )
    return tables or any(module.endswith(EMBEDDING) for module in expert.shapes)


def in_order(one: Expert, other: Expert, words: Vocabulary | None) -> Expert:
    """Rows of single tokens in the order that the first adapter has them. Raises M303 where the tokens are
    others."""
    moved = dict(other.tensors)
    for name in sorted(name for name in one.tensors.keys() & other.tensors.keys() if name.endswith(ROWS)):
        wanted, have = (tokens_of(expert, name) for expert in (one, other))
        if odd := sorted(set(wanted) ^ set(have)):
            has, lacks = (one, other) if odd[0] in wanted else (other, one)
            word = f" ('{words[odd[0]]}')" if words and odd[0] in words else ""
            found = (
                f"an embedding of token {odd[0]}{word} in '{has.path}' but not in '{lacks.path}' ({len(odd)} "
                "tokens differ)"
            )
            raise FedtuneError(
                "M303",
                found,
                "the same trainable_token_indices in every adapter",
                "train the same tokens, or leave one of them out",
            )
        moved[name] = other.tensors[name][[have.index(token) for token in wanted]]
    return replace(other, tensors=moved)


def tokens_of(expert: Expert, name: str) -> list[int]:
    """The ids whose rows a tensor holds, in its order. Raises M305 where the settings do not say."""
    given = expert.config.get("trainable_token_indices")
    module = name.removeprefix(PREFIX).removesuffix(ROWS)
    if isinstance(given, dict):
        given = next((ids for key, ids in given.items() if module == key or module.endswith(f".{key}")), None)
    if (
        not isinstance(given, list)
        or len(given) != len(expert.tensors[name])
        or len(set(given)) != len(given)
    ):
        found = f"{len(expert.tensors[name])} rows of '{module}' in '{expert.path}'"
        raise FedtuneError(
            "M305",
            found,
            "as many different trainable_token_indices in its settings",
            "export the adapter again",
        )
    return [int(token) for token in given]


# --- what stands whole ---


def with_frozen(expert: Expert, experts: Sequence[Expert]) -> Expert:
    """Tables that peft saved though they are not trained, taken from an adapter that has them."""
    given = {
        name: other.tensors[name]
        for other in reversed(experts)
        for name in other.plain
        if name.endswith(FROZEN)
    }
    return replace(expert, tensors=dict(sorted((given | dict(expert.tensors)).items())))


def check_whole(one: Expert, other: Expert) -> None:
    """Raises M303 for tables of different tokens, M305 for tensors that only one has."""
    first, second = one.plain, other.plain
    if odd := sorted(first.keys() ^ second.keys()):
        has, lacks = (one, other) if odd[0] in first else (other, one)
        found = (
            f"'{odd[0].removeprefix(PREFIX)}', which is no LoRA pair, in '{has.path}' but not in "
            f"'{lacks.path}' ({len(odd)} differ)"
        )
        raise FedtuneError(
            "M305",
            found,
            "the same other tensors (modules_to_save, biases) in every adapter",
            "leave one of them out",
        )
    for name, value in first.items():
        if value.shape != second[name].shape:
            words = value.ndim == 2 and value.shape[1:] == second[name].shape[1:]
            found = f"shape {second[name].shape} of '{name.removeprefix(PREFIX)}' in '{other.path}'"
            do = "merge adapters of the same tokens or labels" if words else "merge adapters of one base"
            raise FedtuneError("M303" if words else "M305", found, f"{value.shape}, as in '{one.path}'", do)


# --- pairs ---


def with_zeros(experts: Sequence[Expert]) -> tuple[list[Expert], list[str]]:
    """Every adapter with the pairs of all: those that it lacks are a product of zero, of rank 1. Raises
    M305."""
    shapes: dict[str, tuple[int, int]] = {}
    owner: dict[str, Expert] = {}
    for expert in experts:
        for module, shape in expert.shapes.items():
            if shapes.setdefault(module, shape) != shape:
                found = f"a layer '{module}' of {shape[0]} x {shape[1]} in '{expert.path}'"
                raise FedtuneError(
                    "M305",
                    found,
                    f"{shapes[module][0]} x {shapes[module][1]}, as in '{owner[module].path}'",
                    "merge adapters of one base",
                )
            owner.setdefault(module, expert)
    check_names(owner)
    if any(module.endswith(BIAS) for module in shapes):  # peft's lora_bias is of all modules or of none
        if embedding := next((module for module in shapes if module.endswith(EMBEDDING)), None):
            found = f"lora_bias in one adapter and '{embedding}' in another"
            raise FedtuneError(
                "M305",
                found,
                "what peft can hold in one adapter: biases of linear layers only",
                "leave one of them out",
            )
        shapes |= {
            module + BIAS: (rows, 1)
            for module, (rows, _) in list(shapes.items())
            if not module.endswith(BIAS)
        }
    made, said = [], []
    for expert in experts:
        lacks = sorted(shapes.keys() - expert.shapes.keys())
        zeros = {
            name: value for module in lacks for name, value in zero_pair(module, *shapes[module]).items()
        }
        made.append(replace(expert, tensors=dict(sorted((dict(expert.tensors) | zeros).items()))))
        if layers := [module for module in lacks if not module.endswith(BIAS)]:
            more = f" and {len(layers) - 1} more" if len(layers) > 1 else ""
            said.append(f"'{expert.path}' has no pair for {layers[0]}{more}: zero there")
    return made, said


def zero_pair(module: str, rows: int, columns: int) -> dict[str, np.ndarray]:
    return {
        factor(module, "A"): np.zeros((1, columns), np.float32),
        factor(module, "B"): np.zeros((rows, 1), np.float32),
    }


def check_names(owner: Mapping[str, Expert]) -> None:
    """One layer under two names, with and without an outer module, would be two halves of an adapter. Raises
    M305."""
    layers = {module for module in owner if not module.endswith(BIAS)}
    for module in sorted(layers):
        parts = module.split(".")
        for start in range(1, len(parts) - 1):
            inner = ".".join(parts[start:])
            if inner in layers and owner[inner] is not owner[module]:
                found = (
                    f"the layer '{module}' in '{owner[module].path}' and '{inner}' in '{owner[inner].path}'"
                )
                raise FedtuneError(
                    "M305", found, "one name for a layer", "make both adapters with the same class of model"
                )


# --- the settings of the result ---


def settings_of(read: Sequence[Expert], made: Sequence[Expert]) -> dict[str, Any]:
    """What the first adapter's settings must become for the union: peft's words for where the pairs are, and
    what one adapter alone says.

    `read` are the adapters as they came, `made` those that `aligned` made of them.
    """
    changed: dict[str, Any] = {}
    if any(expert.config.get("lora_bias") for expert in read):
        changed["lora_bias"] = any(module.endswith(BIAS) for module in made[0].shapes)
    for name in ("task_type", "modules_to_save"):
        if value := next((expert.config[name] for expert in read if expert.config.get(name)), None):
            changed[name] = value
    if all(expert.modules == made[0].modules for expert in read):
        return changed
    return changed | dict.fromkeys(WHERE, None) | {"target_modules": targets_of(read, made[0].modules)}


def targets_of(experts: Sequence[Expert], modules: list[str]) -> list[str]:
    """The lists together where they are all that is said (peft reads a list as one or another), else every
    module by its full name."""
    lists = [expert.config.get("target_modules") for expert in experts]
    more = any(
        expert.config.get(name) is not None
        for expert in experts
        for name in WHERE
        if name != "target_modules"
    )
    if not more and all(isinstance(one, list) for one in lists):
        return sorted({str(name) for one in lists for name in one or ()})
    return modules

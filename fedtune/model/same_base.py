"""Whether adapters were made for one base: by fingerprint, by name, or by the weights that two names lead to
on this machine.

peft writes into an adapter where its trainer had the base, so that adapters of one base come with a hub name,
a colleague's path and a
copy's path. `--base` says which base is meant; then shapes, and fingerprints where an adapter has one, are
checked against it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open

from fedtune.errors import FedtuneError
from fedtune.hf.checkpoint import folder_of, weight_files
from fedtune.hf.config import locate
from fedtune.model.base import load
from fedtune.model.lora_files import BIAS, EMBEDDING, PREFIX, Expert
from fedtune.model.settings import ModelSettings
from fedtune.model.union import vocabulary_of

TASKS = {
    "CAUSAL_LM": transformers.AutoModelForCausalLM,
    "SEQ_CLS": transformers.AutoModelForSequenceClassification,
    "SEQ_2_SEQ_LM": transformers.AutoModelForSeq2SeqLM,
    "TOKEN_CLS": transformers.AutoModelForTokenClassification,
    "QUESTION_ANS": transformers.AutoModelForQuestionAnswering,
}
ANY = (transformers.AutoModel, transformers.AutoModelForImageClassification)
OF_A_COPY = frozenset(
    {"_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype", "use_cache"}
)  # no part of what a model is
MISMATCH = "merge adapters of one base; if these names mean the same weights, say so with --base MODEL"


@dataclass(frozen=True)
class BaseName:
    """What peft keeps of a base; `home` is where relative paths are meant from."""

    name: str
    revision: str
    home: Path

    def __str__(self) -> str:
        return f"{self.name} {self.revision}".strip()

    def folder(self) -> Path | None:
        """Where it lies on this machine: a folder, an installed package's, or the hub's cache. None where it
        does not. No network."""
        try:
            place = self.home / Path(locate(self.name)).expanduser()
        except FedtuneError:
            return None
        return folder_of(str(place) if (place / "config.json").exists() else self.name, self.revision)


def named(expert: Expert, home: Path) -> BaseName:
    name, revision = (str(expert.config.get(key) or "") for key in ("base_model_name_or_path", "revision"))
    return BaseName(name, "" if revision == "main" else revision, home)


def check_same(experts: Sequence[Expert], home: Path) -> list[str]:
    """Raises M304 for adapters of different bases. What is to be said: that two names lead to the same
    weights."""
    said = list[str]()
    first, one = experts[0], named(experts[0], home)
    for other in experts[1:]:
        two = named(other, home)
        prints = [expert.about.get("base_fingerprint") for expert in (first, other)]
        if all(prints):
            if prints[0] != prints[1]:
                raise other_base(first, other, *(str(fingerprint)[:12] for fingerprint in prints))
            how = "fingerprints agree"
        elif one == two:
            continue
        else:
            places = one.folder(), two.folder()
            if not places[0] or not places[1] or not same_weights(places[0], places[1]):
                raise other_base(first, other, str(one), str(two))
            how = "the weights there are the same"
        if one != two:
            said.append(f"base model '{one}' of '{first.path}' and '{two}' of '{other.path}': {how}")
    return said


def other_base(first: Expert, other: Expert, one: str, two: str) -> FedtuneError:
    return FedtuneError(
        "M304", f"base model {two[:120]} of '{other.path}'", f"{one[:120]}, that of '{first.path}'", MISMATCH
    )


def same_weights(one: Path, two: Path) -> bool:
    """Whether two folders hold the same model: what the configurations say of it, and every tensor, however
    they are cut into files."""
    if one.resolve() == two.resolve():
        return True
    try:
        if model_config(one) != model_config(two):
            return False
        first, second = places_of(one), places_of(two)
        if not first or first.keys() != second.keys():
            return False
        return all(same_tensor(name, first[name], second[name]) for name in first)
    except (OSError, ValueError):
        return False


def model_config(folder: Path) -> dict[str, Any]:
    known = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return {name: value for name, value in known.items() if name not in OF_A_COPY}


def places_of(folder: Path) -> dict[str, Path]:
    """Tensor name -> file."""
    found: dict[str, Path] = {}
    for path in weight_files(folder):
        with safe_open(str(path), framework="pt") as file:
            found |= dict.fromkeys(file.keys(), path)
    return found


def same_tensor(name: str, one: Path, two: Path) -> bool:
    with safe_open(str(one), framework="pt") as first, safe_open(str(two), framework="pt") as second:
        a, b = first.get_tensor(name), second.get_tensor(name)
    return a.dtype == b.dtype and a.shape == b.shape and bool(torch.equal(a, b))


# --- against the base itself ---


def check_fits(experts: Sequence[Expert], base: BaseName) -> None:
    """Every adapter's layers are in the base, in that shape, and its fingerprint is the base's. Raises M301,
    M303, M304, M305."""
    if not (place := base.folder()):
        raise FedtuneError(
            "M301",
            f"--base {base}, which is not on this machine",
            "a model's folder, or a hub name in the cache",
            "correct it",
        )
    check_layers(experts, base, place)
    do = "give the base that the adapters were made for"
    for expert in experts:
        made_for = expert.about.get("base_fingerprint")
        if made_for and not fits_print(expert, place, made_for):
            raise FedtuneError(
                "M304", f"base model {base}", f"{made_for[:12]}, which '{expert.path}' was made for", do
            )


def check_union(experts: Sequence[Expert], base: BaseName) -> None:
    """The same of layers and tokens alone, where the base is at hand: adapters of the same layers have each
    other as witness, others do not."""
    if place := base.folder():
        check_layers(experts, base, place)


def fits_print(expert: Expert, place: Path, wanted: str) -> bool:
    """Whether a fingerprint is that of the base here. Earlier versions made it of the weights in the type
    that they were loaded in, which the adapter's folder does not say."""
    task, labels = str(expert.about.get("task")), tuple(expert.about.get("labels") or ())
    return any(
        load(ModelSettings(name=str(place), dtype=dtype), task, labels, 0).is_called(wanted)
        for dtype in ("float32", "bfloat16", "float16")
    )


def check_layers(experts: Sequence[Expert], base: BaseName, place: Path) -> None:
    """Raises M305 for layers that the base has not, or in another shape, M303 for embeddings of tokens that
    nothing names."""
    for expert in experts:
        nets = list(networks(expert, place))
        wrong = [odd_layer(expert, dict(net.named_modules())) for net in nets] or [
            f"task {expert.config.get('task_type')}"
        ]
        if all(wrong):
            raise FedtuneError(
                "M305",
                f"the {wrong[0]} in '{expert.path}'",
                f"layers and a task that {base} has",
                "give the base that the adapters were made for",
            )
        net = nets[wrong.index("")]
        if added := added_rows(expert, net):
            found = (
                f"{added} embeddings in '{expert.path}' beyond those of {base}, for tokens that no tokenizer "
                "there names"
            )
            raise FedtuneError(
                "M303", found, "a tokenizer in the folder of every adapter that adds tokens", "save it there"
            )


def networks(expert: Expert, place: Path) -> Iterator[Any]:
    """The base without weights, as each class that the adapter's task can mean: nothing is loaded."""
    config = transformers.AutoConfig.from_pretrained(str(place), trust_remote_code=False)
    wanted = TASKS.get(str(expert.config.get("task_type") or ""))
    for kind in [wanted] if wanted else [*TASKS.values(), *ANY]:
        try:
            with torch.device("meta"):
                yield kind.from_config(config, trust_remote_code=False)
        except (
            ValueError,
            KeyError,
            AttributeError,
            NotImplementedError,
        ):  # no such head for this architecture
            continue


def odd_layer(expert: Expert, modules: Mapping[str, Any]) -> str:
    """The first layer that a network does not have, or has in another shape; empty where all fit."""
    if expert.config.get("layer_replication"):  # which makes layers that the base alone does not have
        return ""
    for layer, (rows, columns) in sorted(expert.shapes.items()):
        name = layer.removesuffix(EMBEDDING).removesuffix(BIAS)
        weight = getattr(modules.get(name), "weight", None)
        if weight is None:
            return f"layer '{name}'"
        if name == layer and sorted(weight.shape) != sorted((rows, columns)):  # Conv1D keeps columns x rows
            return f"layer '{name}' of {rows} x {columns}"
    for name in expert.plain:
        module = re.split(r"\.(?:base_layer|token_adapter)\.", name.removeprefix(PREFIX))[0]
        if module not in modules and module.rpartition(".")[0] not in modules:
            return f"tensor '{name.removeprefix(PREFIX)}'"
    return ""


def added_rows(expert: Expert, net: Any) -> int:
    """How many tokens its tables have beyond the base's, where no tokenizer in its folder says which."""
    if vocabulary_of(expert) is not None:
        return 0
    tables = [
        module for module in (net.get_input_embeddings(), net.get_output_embeddings()) if module is not None
    ]
    names = {
        name: module.weight.shape[0]
        for name, module in net.named_modules()
        if any(module is table for table in tables)
    }
    held = [
        (expert.plain.get(f"{PREFIX}{name}{end}"), rows)
        for name, rows in names.items()
        for end in (".weight", ".base_layer.weight")
    ]
    return max((len(value) - rows for value, rows in held if value is not None), default=0)

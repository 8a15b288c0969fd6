"""LoRA adapters as tensors: folders that peft wrote are read without their model, and one is written for peft to load.

Every pair is brought to scale 1: B times the module's own alpha / r (rank_pattern, alpha_pattern and rsLoRA inside), so that what peft
adds to a weight is plain B @ A.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import save_file
from safetensors.torch import load_file

from fedtune.errors import FedtuneError
from fedtune.model.base import Base
from fedtune.model.bench import Bench, attach
from fedtune.model.export import SIDECAR
from fedtune.model.settings import AdapterSettings

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
FACTOR = re.compile(r"^(?:base_model\.model\.)?(.+?)\.lora_(?:embedding_)?(A|B)(?:\.weight)?$")
STARTS = (True, False, "gaussian", "eva", "orthogonal")  # ways to start that leave the base alone; pissa, olora, corda and loftq change it
VARIANTS = ("use_qalora", "use_bdlora", "arrow_config", "kasa_config", "monteclora_config", "alora_invocation_tokens", "target_parameters")
ALIKE = ("task_type", "use_dora", "fan_in_fan_out", "layer_replication")  # settings that merged adapters must share


@dataclass(frozen=True)
class Expert:
    """One adapter.

    config   peft's adapter_config.json
    about    fedtune.json beside it; {} where another program wrote the folder
    tensors  peft's file names -> float32, pairs at scale 1
    sha256   of adapter_model.safetensors
    """

    path: Path
    config: Mapping[str, Any]
    about: Mapping[str, Any]
    tensors: Mapping[str, np.ndarray]
    sha256: str

    @property
    def modules(self) -> list[str]:
        """Full names in the model of what is adapted."""
        return sorted({found[1] for name in self.tensors if (found := FACTOR.match(name))})

    @property
    def rank(self) -> int:
        """The greatest of its pairs."""
        greatest: int = max(value.shape[0] for name, value in self.tensors.items() if (found := FACTOR.match(name)) and found[2] == "A")
        return greatest


def read_expert(folder: Path) -> Expert:
    """From an adapter's folder, or from the run that left one. Raises M304 where there is none, M306 where it is not plain LoRA, M305."""
    place = folder / "adapter" if (folder / "adapter" / CONFIG).exists() else folder
    try:
        config = json.loads((place / CONFIG).read_text(encoding="utf-8"))
        about = json.loads((place / SIDECAR).read_text(encoding="utf-8")) if (place / SIDECAR).exists() else {}
        with (place / TENSORS).open("rb") as handle:
            sha256 = hashlib.file_digest(handle, "sha256").hexdigest()
        raw = {name: value.to(torch.float32).numpy() for name, value in load_file(str(place / TENSORS)).items()}
        if not isinstance(config, dict) or not isinstance(about, dict):
            raise ValueError(f"{CONFIG} is no table")
    except (OSError, ValueError, SafetensorError) as error:
        found = f"no adapter in '{folder}' ({type(error).__name__}: {str(error)[:120]})"
        raise FedtuneError("M304", found, f"{CONFIG} and {TENSORS}", "name an adapter's folder, or that of a finished run") from error
    check_plain(config, place)
    expert = Expert(place, config, about, {name: scaled(config, name, raw[name], place) for name in sorted(raw)}, sha256)
    if not expert.modules:
        raise FedtuneError("M306", f"an adapter without LoRA pairs in '{place}'", "pairs of linear layers", "leave it out")
    return expert


def check_plain(config: Mapping[str, Any], place: Path) -> None:
    """Raises M306 for other adapters than LoRA, and for LoRA whose product is not what is added to the base."""
    if config.get("peft_type") != "LORA":
        raise FedtuneError("M306", f"an adapter of type {config.get('peft_type')} in '{place}'", "LORA", "leave it out")
    odd = [name for name in VARIANTS if config.get(name)]
    if config.get("init_lora_weights", True) not in STARTS:
        odd.append(f"init_lora_weights = {config['init_lora_weights']}")
    if odd:
        raise FedtuneError(
            "M306", f"LoRA with {odd[0]} in '{place}'", "pairs whose product is added to the untouched base", "convert it with peft, or leave it out"
        )


def scaled(config: Mapping[str, Any], name: str, value: np.ndarray, place: Path) -> np.ndarray:
    """A tensor of the file at scale 1. Raises M305 where a pair has another rank than the config says, which also sets its scale."""
    found = FACTOR.match(name)
    if not found:
        return value
    rank, alpha = (pattern_of(config.get(f"{what}_pattern") or {}, found[1], config.get(key)) for what, key in (("rank", "r"), ("alpha", "lora_alpha")))
    have = value.shape[0 if found[2] == "A" else 1] if value.ndim == 2 else value.shape
    if have != rank or not isinstance(alpha, (int, float)):
        raise FedtuneError("M305", f"rank {have} of '{name}' in '{place}'", f"{rank}, and a number for alpha, as its {CONFIG} says", "export the adapter again")
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return value if found[2] == "A" else np.multiply(value, scale, dtype=np.float64).astype(np.float32)


def pattern_of(patterns: Mapping[str, Any], module: str, otherwise: Any) -> Any:
    """The value of the first pattern that a module's name ends with, as peft looks it up."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), otherwise)


def check_alike(experts: Sequence[Expert]) -> None:
    """Adapters of one base and of the same modules can be merged. Raises M304 for another base, task or label set, M305 for other modules or settings.

    Bases are compared by fingerprint; where an adapter came without one, by name and revision.
    """
    first = experts[0]
    for other in experts[1:]:
        known = bool(first.about.get("base_fingerprint") and other.about.get("base_fingerprint"))
        for what, one, two in (
            ("base model", *((e.about["base_fingerprint"][:12] if known else base_name(e)) for e in (first, other))),
            ("label set", *(e.about.get("labels") if first.about and other.about else None for e in (first, other))),
        ):
            if one != two:
                found, expected = f"{what} {str(two)[:120]} of '{other.path}'", f"{str(one)[:120]}, that of '{first.path}'"
                raise FedtuneError("M304", found, expected, "merge adapters of one base")
        for name in ALIKE:
            if (first.config.get(name) or None) != (other.config.get(name) or None):
                found, expected = f"{name} = {other.config.get(name)} in '{other.path}'", f"{first.config.get(name)}, as in '{first.path}'"
                raise FedtuneError("M305", found, expected, "leave one of them out")
        if odd := sorted(first.tensors.keys() ^ other.tensors.keys()):
            where, lacks = (first, other) if odd[0] in first.tensors else (other, first)
            found = f"'{odd[0].removeprefix(PREFIX)}' in '{where.path}' but not in '{lacks.path}' ({len(odd)} differ)"
            raise FedtuneError("M305", found, "the same target modules and the same other tensors in every adapter", "leave one of them out")


def base_name(expert: Expert) -> str:
    return " ".join(str(expert.config[key]) for key in ("base_model_name_or_path", "revision") if expert.config.get(key))


def seated(base: Base, expert: Expert, tensors: Mapping[str, np.ndarray], rank: int) -> Bench:
    """The base with tensors like this expert's, of one rank and scale 1. Raises M304 for another base than the expert's, M302, M305."""
    made_for = expert.about.get("base_fingerprint")
    if made_for and made_for != base.fingerprint:
        raise FedtuneError("M304", f"base model {base.fingerprint[:12]}", f"{made_for[:12]}, which the adapters were made for", "name a run on that base")
    settings = AdapterSettings(rank=rank, alpha=float(rank), targets=tuple(expert.modules), dora=bool(expert.config.get("use_dora")))
    bench = attach(base, settings, 0)
    bench.write(tensors)
    return bench


def write_expert(folder: Path, like: Expert, tensors: Mapping[str, np.ndarray], rank: int, card: str) -> None:
    """A folder that stock peft loads: this expert's config at one rank and scale 1. With fedtune.json where the expert has one."""
    changed = {"r": rank, "lora_alpha": rank, "rank_pattern": {}, "alpha_pattern": {}, "use_rslora": False, "init_lora_weights": True, "inference_mode": True}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(tensors), str(folder / TENSORS), metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(dict(like.config) | changed, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    if like.about:
        adapter = dict(like.about.get("adapter") or {}) | {"rank": rank, "alpha": float(rank), "rslora": False}
        (folder / SIDECAR).write_text(json.dumps(dict(like.about) | {"adapter": adapter}, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(card, encoding="utf-8")

"""LoRA adapters as tensors: folders that peft wrote are read without their model, and one is written for peft
to load.

Every pair is brought to scale 1: B times the module's own alpha / r (rank_pattern, alpha_pattern and rsLoRA
inside), so that what peft
adds to a weight is plain B @ A. peft multiplies a bias of B (lora_bias) likewise and adds it to the layer's:
here it is a pair of its own,
a product of d x 1, so that every rule of products holds for it.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import save_file
from safetensors.torch import load_file
from safetensors.torch import save_file as save_torch

from fedtune.errors import FedtuneError
from fedtune.model.adapters import Lora
from fedtune.model.base import Base
from fedtune.model.export import SIDECAR
from fedtune.model.plain_lora import check_plain
from fedtune.model.tunable import TunableModel, attach

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
FACTOR = re.compile(r"^base_model\.model\.(?:(.+)\.lora_(A|B)\.weight|(.+\.lora_embedding)_(A|B))$")
BIASES = re.compile(r"^base_model\.model\.(.+)\.lora_B\.bias$")
EMBEDDING, BIAS = ".lora_embedding", ".lora_B_bias"  # how the module of such a pair ends here
STARTS_ANEW: dict[str, Any] = dict.fromkeys(
    ("eva_config", "corda_config", "lora_ga_config", "velora_config"), None
) | {"loftq_config": {}}  # of training only


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
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Module (without PREFIX) -> rows and columns of its pair's product; EMBEDDING or BIAS at the end of
        its name where it is one."""
        sides = {found: value.shape for name, value in self.tensors.items() if (found := factor_of(name))}
        return {
            module: (sides[module, "B"][0], shape[1])
            for (module, side), shape in sides.items()
            if side == "A"
        }

    @property
    def plain(self) -> dict[str, np.ndarray]:
        """What is no pair: heads, tables, trained biases, rows of tokens."""
        return {name: value for name, value in self.tensors.items() if not factor_of(name)}

    @property
    def modules(self) -> list[str]:
        """Full names in the model of what is adapted."""
        return sorted(module.removesuffix(EMBEDDING) for module in self.shapes if not module.endswith(BIAS))

    @property
    def rank(self) -> int:
        """The greatest of its pairs."""
        return max(
            int(value.shape[0])
            for name, value in self.tensors.items()
            if (found := factor_of(name)) and found[1] == "A"
        )


def factor_of(name: str) -> tuple[str, str] | None:
    """Module and factor of a tensor's name, None where it belongs to no pair."""
    found = FACTOR.match(name)
    return (found[1] or found[3], found[2] or found[4]) if found else None


def factor(module: str, side: str) -> str:
    """The inverse of `factor_of`."""
    return (
        f"{PREFIX}{module}_{side}" if module.endswith(EMBEDDING) else f"{PREFIX}{module}.lora_{side}.weight"
    )


def read_expert(folder: Path) -> Expert:
    """From an adapter's folder, or from the run that left one. Raises M304 where there is none, M306 where it
    is not plain LoRA, M305."""
    place = folder / "adapter" if (folder / "adapter" / CONFIG).exists() else folder
    try:
        config = json.loads((place / CONFIG).read_text(encoding="utf-8"))
        about = (
            json.loads((place / SIDECAR).read_text(encoding="utf-8")) if (place / SIDECAR).exists() else {}
        )
        with (place / TENSORS).open("rb") as handle:
            sha256 = hashlib.file_digest(handle, "sha256").hexdigest()
        raw = {
            name: value.to(torch.float32).numpy() for name, value in load_file(str(place / TENSORS)).items()
        }
        if not isinstance(config, dict) or not isinstance(about, dict):
            raise ValueError(f"{CONFIG} is no table")
    except (OSError, ValueError, SafetensorError) as error:
        found = f"no adapter in '{folder}' ({type(error).__name__}: {str(error)[:120]})"
        raise FedtuneError(
            "M304", found, f"{CONFIG} and {TENSORS}", "give the folder of an adapter or of a finished run"
        ) from error
    check_plain(config, sorted(raw), place)
    tensors = {key: part for name in raw for key, part in scaled(config, name, raw[name], place).items()}
    expert = Expert(place, config, about, {name: tensors[name] for name in sorted(tensors)}, sha256)
    check_pairs(expert)
    if not expert.modules:
        raise FedtuneError(
            "M306", f"an adapter without LoRA pairs in '{place}'", "pairs of linear layers", "leave it out"
        )
    return expert


def scaled(config: Mapping[str, Any], name: str, value: np.ndarray, place: Path) -> dict[str, np.ndarray]:
    """A tensor of the file at scale 1; a bias of B as a pair. Raises M305 where a pair has another rank than
    the config says, which sets its scale."""
    pair, bias = factor_of(name), BIASES.match(name)
    if not pair and not bias:
        return {name: value}
    module, side = pair or (bias[1] if bias else "", "B")
    layer = module.removesuffix(EMBEDDING)
    rank, alpha = (
        pattern_of(config.get(f"{what}_pattern") or {}, layer, config.get(key))
        for what, key in (("rank", "r"), ("alpha", "lora_alpha"))
    )
    if pair and value.ndim != 2:
        raise FedtuneError(
            "M306",
            f"'{name}' of shape {value.shape} in '{place}'",
            "pairs of matrices (linear layers, embeddings)",
            "leave it out",
        )
    have = value.shape[0 if side == "A" else 1] if pair else rank
    if have != rank or not isinstance(rank, int) or not isinstance(alpha, (int, float)):
        raise FedtuneError(
            "M305",
            f"rank {have} of '{name}' in '{place}'",
            f"{rank}, and a number for alpha, as its {CONFIG} says",
            "export the adapter again",
        )
    if side == "A":
        return {name: value}
    whole = np.multiply(
        value, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank), dtype=np.float64
    ).astype(np.float32)
    if pair:
        return {name: whole}
    return {
        factor(module + BIAS, "A"): np.ones((1, 1), np.float32),
        factor(module + BIAS, "B"): whole.reshape(-1, 1),
    }


def check_pairs(expert: Expert) -> None:
    """Raises M305 for half a pair, and for numbers that are under no name that peft would read."""
    sides = {found for name in expert.tensors if (found := factor_of(name))}
    for module, side in sorted(sides):
        if (module, {"A": "B", "B": "A"}[side]) not in sides:
            raise FedtuneError(
                "M305",
                f"half a pair in '{expert.path}': '{factor(module, side)}'",
                "both factors of every layer",
                "export the adapter again",
            )
    if odd := next((name for name in expert.tensors if not name.startswith(PREFIX)), None):
        raise FedtuneError(
            "M305",
            f"'{odd}' in '{expert.path}'",
            f"names that begin with {PREFIX}, as peft's do",
            "export the adapter again",
        )


def narrow(folder: Path, layers: Collection[str]) -> None:
    """Leave out, of the adapter in a folder, the pairs of all layers but these (as peft names them), whose
    full names then are its targets."""
    tensors = load_file(str(folder / TENSORS))
    left = {
        name: value
        for name, value in tensors.items()
        if not (found := factor_of(name)) or PREFIX + found[0] in layers
    }
    if len(left) == len(tensors):
        return
    modules = sorted(layer.removeprefix(PREFIX) for layer in layers)
    save_torch(left, str(folder / TENSORS), metadata={"format": "pt"})
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8")) | {"target_modules": modules}
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    about = json.loads((folder / SIDECAR).read_text(encoding="utf-8"))
    about["adapter"] |= {"targets": modules, "last": 0, "band": [0.0, 1.0], "keep_front": False}
    (folder / SIDECAR).write_text(json.dumps(about, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def unfolded(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Under peft's names: biases of B are vectors again."""
    made = {
        name: value
        for name, value in tensors.items()
        if not ((found := factor_of(name)) and found[0].endswith(BIAS))
    }
    for name, value in tensors.items():
        found = factor_of(name)
        if found and found[0].endswith(BIAS) and found[1] == "B":
            product = value.astype(np.float64) @ tensors[factor(found[0], "A")].astype(
                np.float64
            )  # (rows, 1)
            made[f"{PREFIX}{found[0].removesuffix(BIAS)}.lora_B.bias"] = product[:, 0].astype(np.float32)
    return made


def pattern_of(patterns: Mapping[str, Any], module: str, otherwise: Any) -> Any:
    """The value of the first pattern that a module's name ends with, as peft looks it up."""
    return next(
        (value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), otherwise
    )


def seated(base: Base, expert: Expert, tensors: Mapping[str, np.ndarray], rank: int) -> TunableModel:
    """The base with tensors like this expert's, of one rank and scale 1. Raises M304 for another base than
    the expert's, M302, M305, M306."""
    made_for = expert.about.get("base_fingerprint")
    if made_for and not base.is_called(made_for):
        raise FedtuneError(
            "M304",
            f"base model {base.fingerprint[:12]}",
            f"{made_for[:12]}, which the adapters were made for",
            "give a run on that base",
        )
    if any(module.endswith((BIAS, EMBEDDING)) for module in expert.shapes):
        found = f"--eval with '{expert.path}', which has lora_bias or an adapted embedding"
        raise FedtuneError(
            "M306",
            found,
            "LoRA pairs of linear layers only, which fedtune can load into a base",
            "merge without --eval",
        )
    tunable = attach(base, Lora(rank=rank, alpha=float(rank), targets=tuple(expert.modules)), 0)
    tunable.write(tensors)
    return tunable


def write_expert(
    folder: Path,
    like: Expert,
    settings: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    rank: int,
    card: str,
) -> None:
    """A folder that stock peft loads: this expert's config with `settings` in it, at one rank and scale 1.
    With fedtune.json where the expert has one."""
    changed = {
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_rslora": False,
        "inference_mode": True,
    }
    started = {name: value for name, value in STARTS_ANEW.items() if name in like.config} | {
        "init_lora_weights": True
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(unfolded(tensors), str(folder / TENSORS), metadata={"format": "pt"})
    config = dict(like.config) | changed | started | dict(settings)
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    if like.about:
        adapter = dict(like.about.get("adapter") or {}) | {
            "rank": rank,
            "alpha": float(rank),
            "rslora": False,
        }
        if "target_modules" in settings:  # other modules than this expert's
            adapter |= {"targets": like.modules, "last": 0}
        about = dict(like.about) | {"adapter": adapter, "base": config.get("base_model_name_or_path", "")}
        (folder / SIDECAR).write_text(json.dumps(about, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(card, encoding="utf-8")

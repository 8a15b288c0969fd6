"""The first state of a run, taken from an adapter that was trained before: of a run, exported, or made by
stock peft."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from fedtune.errors import FedtuneError
from fedtune.model.adapters import Lora
from fedtune.model.export import OWN_FILE, SIDECAR
from fedtune.model.sparse_support import without_positions
from fedtune.model.tunable import TunableModel
from fedtune.types import LM_TASKS

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


def start_from(tunable: TunableModel, folder: str) -> None:
    """Write an adapter's tensors into the tunable model. Raises M304 where it is not this base's or not this
    kind's,
    M305 for other names or shapes."""
    place = Path(folder).expanduser()
    place = place / "adapter" if (place / "adapter").is_dir() else place
    try:
        about = json.loads((place / SIDECAR).read_text()) if (place / SIDECAR).exists() else None
        config = json.loads((place / CONFIG).read_text()) if (place / CONFIG).exists() else None
        file = place / OWN_FILE if (place / OWN_FILE).exists() else place / TENSORS
        tensors = load_file(str(file))
    except (OSError, ValueError, SafetensorError) as error:
        found = f"no adapter in '{folder}' ({type(error).__name__})"
        raise FedtuneError(
            "M304", found, f"a run, or a folder with {TENSORS}", "correct method.start_from"
        ) from error
    if about is not None:
        require_same_base(tunable, about, folder)
    elif config is not None:
        require_same_scale(tunable, config, folder)
    tensors = without_positions(tunable.net, tensors, folder)
    tunable.write({name: np.asarray(value, np.float32) for name, value in tensors.items()})


def require_same_base(tunable: TunableModel, about: dict[str, Any], folder: str) -> None:
    """What fedtune wrote beside the tensors names base, task and labels."""
    base = tunable.base
    for what, want, have in (
        ("base model", base.fingerprint, about.get("base_fingerprint")),
        ("labels", list(base.labels), about.get("labels")),
    ):
        if want != have and not base.is_called(have):
            raise FedtuneError(
                "M304",
                f"'{folder}', made for {what} {str(have)[:80]}",
                str(want)[:80],
                "start from an adapter of the same base and labels",
            )
    if about.get("task") != base.task and not {about.get("task"), base.task} <= set(LM_TASKS):
        raise FedtuneError(
            "M304",
            f"'{folder}', made for {about.get('task')}",
            f"an adapter for {base.task}",
            "start from an adapter of the same task",
        )


def require_same_scale(tunable: TunableModel, config: dict[str, Any], folder: str) -> None:
    """A stock adapter says how its product is scaled; under another scale it would be another adapter."""
    settings = tunable.settings
    if config.get("peft_type") != "LORA" or not isinstance(settings, Lora):
        raise FedtuneError(
            "M304",
            f"'{folder}', an adapter of type {config.get('peft_type')}",
            "a LoRA adapter and kind = 'lora'",
            "correct method.start_from",
        )
    mine = {
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        "use_rslora": settings.rslora,
        "use_dora": settings.dora,
    }
    for key, want in mine.items():
        if config.get(key, False) != want or config.get("rank_pattern") or config.get("alpha_pattern"):
            raise FedtuneError(
                "M304",
                f"'{folder}' with {key} = {config.get(key)}",
                f"{key} = {want}, and no patterns of ranks or alphas, as [method.adapter] says",
                "set [method.adapter] to what the adapter was made with",
            )

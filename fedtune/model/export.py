"""What a federation leaves behind: an adapter folder that stock peft loads, or a merged model, each with a
card."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
from peft.utils import ModulesToSaveWrapper
from safetensors.numpy import load_file, save_file

from fedtune.errors import FedtuneError
from fedtune.model import standalone
from fedtune.model.adapters import ADAPTERS, read_adapter
from fedtune.model.adapters.wrap import file_name
from fedtune.model.base import Base
from fedtune.model.blocks import is_encoder
from fedtune.model.sparse_stages import is_staged, save_as_one_support
from fedtune.model.sparse_support import without_positions
from fedtune.model.tunable import TunableModel, attach, detach, read
from fedtune.model.usage import usage
from fedtune.types import LM_TASKS

SIDECAR = "fedtune.json"
OWN_FILE = (
    "fedtune_adapter.safetensors"  # tensors under fedtune's names, where peft's file does not hold them
)


def is_stock(tunable: TunableModel) -> bool:
    """Whether `PeftModel.from_pretrained` loads what `save_adapter` writes. Not bias, head, full, bottlenecks
    and our own prompts."""
    return isinstance(tunable.net, peft.PeftModel)


def save(form: str, tunable: TunableModel, folder: str | Path, card: str) -> None:
    """Write the tunable model as `form` says: adapter or merged."""
    if form == "merged":
        save_merged(tunable, folder, card)
    else:
        save_adapter(tunable, folder, tunable.base.name, card)


def save_adapter(tunable: TunableModel, folder: str | Path, base_name: str, card: str) -> None:
    """Write the adapter, the card (README.md) and fedtune.json, which names the base by fingerprint.

    Kinds that peft has become adapter_config.json and adapter_model.safetensors. The others become
    fedtune_adapter.safetensors, which
    `load_adapter` reads, and load.py beside it without fedtune. The tokenizer (or image processor) and the
    labels lie beside both.
    """
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    staged = is_staged(tunable.net)
    if is_stock(tunable):
        config = tunable.net.peft_config["default"]
        config.base_model_name_or_path = base_name
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tunable.net.save_pretrained(str(place), safe_serialization=True, save_embedding_layers=False)
        if staged:
            save_as_one_support(tunable.net, place)
        sort_lists(place / "adapter_config.json")
    if not is_stock(tunable) or staged or (tunable.settings and tunable.settings.has_encoder):
        save_file(tunable.read(), str(place / OWN_FILE))
    base = tunable.base
    about = {
        "format": 1,
        "base": base_name,
        "base_fingerprint": base.fingerprint,
        "task": base.task,
        "labels": list(base.labels),
    }
    about["adapter"] = tunable.settings.model_dump(mode="json") if tunable.settings else None
    about["pooling"] = base.pooling
    about["pad_token_id"] = None if base.task == "image-classify" else base.tokenizer.pad_token_id
    about["behind_class_token"] = is_encoder(base)  # where prompts of our own enter
    (place / SIDECAR).write_text(json.dumps(about, indent=2, sort_keys=True) + "\n")
    base.tokenizer.save_pretrained(str(place))
    stock = is_stock(tunable) and base.pooling == "own"
    if not stock:
        (place / "load.py").write_bytes(Path(standalone.__file__).read_bytes())
    (place / "README.md").write_text(card + "\n" + usage("stock" if stock else "script", about))


def sort_lists(path: Path) -> None:
    """peft writes sets of module names in whatever order they have in this process; the same run writes the
    same file."""
    config = json.loads(path.read_text())
    names = {
        key: sorted(value)
        for key, value in config.items()
        if isinstance(value, list) and all(isinstance(one, str) for one in value)
    }
    path.write_text(json.dumps(config | names, indent=2, sort_keys=True) + "\n")


def load_adapter(base: Base, folder: str | Path) -> TunableModel:
    """A tunable model with the adapter that `save_adapter` wrote. Raises M304 if it was made for another
    base, task or label set."""
    place = Path(folder)
    about = sidecar(place)
    try:
        settings = read_adapter(about["adapter"])
        file = place / OWN_FILE if (place / OWN_FILE).exists() else place / "adapter_model.safetensors"
        tensors = load_file(str(file))
    except (OSError, ValueError, KeyError) as error:
        raise no_adapter(place, error) from error
    for what, want, have in (
        ("task", base.task, about["task"]),
        ("labels", list(base.labels), about["labels"]),
        ("base model", base.fingerprint, about["base_fingerprint"]),
    ):
        alike = (what == "task" and {want, have} <= set(LM_TASKS)) or base.is_called(have)
        if want != have and not alike:
            raise FedtuneError(
                "M304",
                f"an adapter for {what} {str(have)[:80]}",
                str(want)[:80],
                f"load it on the base that it was made for ({about['base']})",
            )
    tunable = attach(base, settings, 0)
    try:
        tensors = without_positions(tunable.net, tensors, str(place))
        tunable.write(without_statistics(tunable, tensors))
    except FedtuneError:
        detach(tunable)
        raise
    return tunable


def without_statistics(tunable: TunableModel, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What is trained: peft also saves the running statistics of a head with a batch norm, which stay as they
    are here."""
    here = {file_name(name): value for name, value in tunable.net.named_buffers()}
    same = {
        name
        for name, value in tensors.items()
        if name in here and np.array_equal(value, here[name].cpu().numpy())
    }
    return {name: value for name, value in tensors.items() if name in tunable.named or name not in same}


def sidecar(place: Path) -> dict[str, Any]:
    """What fedtune.json says of an adapter: base, task, labels, settings. Raises M304."""
    try:
        about = json.loads((place / SIDECAR).read_text())
        if (
            not isinstance(about, dict)
            or not {"base", "task", "labels", "adapter", "base_fingerprint"} <= about.keys()
        ):
            raise ValueError("an entry is missing")
    except (OSError, ValueError) as error:
        raise no_adapter(place, error) from error
    return about


def no_adapter(place: Path, error: Exception) -> FedtuneError:
    found = f"no adapter of fedtune in {place} ({str(error)[:120]})"
    return FedtuneError(
        "M304", found, f"{SIDECAR} beside the tensors", "give the folder that 'fedtune export' wrote"
    )


def merged_net(tunable: TunableModel) -> Any:
    """A copy of the model, on the CPU, with the adapter folded in; trained values are rounded to the base's
    dtype. Nothing is folded into weights of 4 or 8 bits: those of the checkpoint are read again. Raises M306
    for kinds that add layers or tokens."""
    if tunable.settings and not tunable.settings.merges:
        known = ", ".join(kind for kind, adapter in ADAPTERS.items() if adapter.merges)
        raise FedtuneError(
            "M306",
            f"kind '{tunable.kind}' for a merged model",
            f"one of {known}",
            "export it with --as adapter",
        )
    if tunable.base.whole:
        tunable = on_whole_base(tunable)
    merged: Any = copy.deepcopy(tunable.net).to("cpu")
    if is_stock(tunable):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            merged = merged.merge_and_unload()
        for name, module in list(
            merged.named_modules()
        ):  # peft 0.21 leaves the task head wrapped when it merges layer norms
            if isinstance(module, ModulesToSaveWrapper):
                merged.set_submodule(name, module.modules_to_save["default"])
    return merged.to(next(iter(tunable.base.weights.values())).dtype)


def on_whole_base(tunable: TunableModel) -> TunableModel:
    """The same trained tensors on the base as its checkpoint has it."""
    assert tunable.base.whole is not None and tunable.settings is not None
    made = attach(tunable.base.whole(), tunable.settings, 0)
    made.write(read({**tunable.named, **tunable.still}))
    return made


def save_merged(tunable: TunableModel, folder: str | Path, card: str) -> None:
    """Write the whole model with the adapter folded in, and its tokenizer. Raises M306 for kinds that add
    layers or tokens."""
    merged = merged_net(tunable)
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    with torch.no_grad():
        merged.save_pretrained(str(place))
    tunable.base.tokenizer.save_pretrained(str(place))
    base = tunable.base
    about = {
        "format": 1,
        "task": base.task,
        "labels": list(base.labels),
        "base": base.name,
        "pooling": base.pooling,
    }
    if base.pooling != "own":  # which no configuration of the class can say
        (place / SIDECAR).write_text(json.dumps(about, indent=2, sort_keys=True) + "\n")
        (place / "load.py").write_bytes(Path(standalone.__file__).read_bytes())
    (place / "README.md").write_text(
        card + "\n" + usage("merged" if base.pooling == "own" else "script", about)
    )

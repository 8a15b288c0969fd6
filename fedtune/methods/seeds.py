"""A tuned model as a file of kilobytes: which base, which directions, and how far along each. One safetensors
file, never a pickle.

Its tensors are the accumulators of every pool and the fingerprint of what they follow from; its metadata
"fedtune" is JSON of all else that is
needed to rebuild the model from the base.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from fedtune.errors import FedtuneError
from fedtune.types import Tensors

if TYPE_CHECKING:
    from fedtune.model.base import Base
    from fedtune.model.tunable import TunableModel

FILE = "seeds.safetensors"
FORMAT = 1
MOST = 1 << 30  # bytes of a file that is read: 64 pools of a million directions


@dataclass(frozen=True)
class Seeds:
    """What a seed file holds.

    base      name of the base model where the file was made, and its fingerprint, type of weights, task and
              labels
    seed      of the run, and its number of rounds
    method    the [method] table
    pooling   of the base, as model.pooling says it; a file of 0.1.0 does not say it, and means the class's
              own
    tensors   accumulators and fingerprint, as in the run's state
    """

    base: str
    base_fingerprint: str
    dtype: str
    task: str
    labels: tuple[str, ...]
    seed: int
    rounds: int
    method: Mapping[str, Any]
    tensors: Tensors
    pooling: str = "pooler"


def start_of(tunable: TunableModel, typed: bool = False) -> bytes:
    """SHA-256 of what training starts from: values of the base model as it is held, tokenizer, first values,
    and the run's seed, which names the pools. typed: as earlier versions said it, which told types apart,
    too."""
    base, origin = tunable.base, tunable.origin
    held = base.typed_fingerprint if typed else base.held_fingerprint
    return hashlib.sha256(bytes.fromhex(held) + origin.digest + str(origin.seed).encode()).digest()


def seeds_of(base: Base, seed: int, rounds: int, method: Mapping[str, Any], tensors: Tensors) -> Seeds:
    """What a run with this base has reached, as a seed file holds it."""
    from fedtune.hf.pooling import stated

    stored = str(next(iter(base.weights.values())).dtype).removeprefix("torch.")
    pooling = stated(base.pooling)
    return Seeds(
        base.name,
        base.held_fingerprint,
        stored,
        base.task,
        base.labels,
        seed,
        rounds,
        method,
        tensors,
        pooling,
    )


def save_seeds(folder: Path, seeds: Seeds, card: str) -> None:
    """Write the file and its card."""
    folder.mkdir(parents=True, exist_ok=True)
    about = {key: value for key, value in vars(seeds).items() if key != "tensors"} | {"format": FORMAT}
    save_file(
        {name: np.ascontiguousarray(value) for name, value in seeds.tensors.items()},
        str(folder / FILE),
        {"fedtune": json.dumps(about, sort_keys=True)},
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def read_seeds(path: Path) -> Seeds:
    """Read a seed file, or the one in a folder. Raises R403 where it is none."""
    file = path / FILE if path.is_dir() else path
    try:
        if file.stat().st_size > MOST:
            raise ValueError(f"{file.stat().st_size} bytes")
        with safe_open(str(file), "np") as opened:
            about = json.loads((opened.metadata() or {})["fedtune"])
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        if about.pop("format") != FORMAT:
            raise ValueError("another format")
        if any(value.dtype.kind not in "iu" for value in tensors.values()):
            raise ValueError("numbers that are not whole")
        return Seeds(**{**about, "labels": tuple(about["labels"])}, tensors=tensors)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        why = f"{type(error).__name__}: {str(error)[:120]}"
        make = "make one with: fedtune export RUN --as seeds"
        raise FedtuneError(
            "R403", f"no seed file at '{path}' ({why})", f"a {FILE} that fedtune wrote", make
        ) from error


def pools_of(shared: Tensors) -> dict[str, np.ndarray]:
    """The accumulators of every pool, by its name."""
    return {name: value for name, value in shared.items() if name.startswith("pool-")}


def pool_name(epoch: int) -> str:
    return f"pool-{epoch:04d}"

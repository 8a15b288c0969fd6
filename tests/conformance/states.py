"""Short recipes of every sort, and the bytes with which they end: what a redesign must not change.

python -m tests.conformance.states [RECIPE ...]

writes this machine's hashes to tests/golden/states.json, since the bits of a sum depend on the processor. For
the recipes that are named, whose bytes were meant to change, the hashes of other machines are dropped.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedtune.runtime.checkpoints import load_state
from tests import small, tiny
from tests.conformance.recipes import METHODS
from tests.model.cases import VARIANTS

FILE = Path(__file__).parents[1] / "golden" / "states.json"
CAUSAL = {"data__task": "causal-lm", "data__max_length": 24}
MORE: dict[str, dict[str, Any]] = {
    **{
        f"kind {name}": {"method__adapter": {**change, "kind": change["kind"]}}
        for name, change in VARIANTS.items()
        if name != "prefix"
    },
    **{
        f"causal {name}": {"method__adapter": VARIANTS[name], **CAUSAL}
        for name in ("lora", "prefix", "prompt", "full", "ia3")
    },
    "causal preference": {  # a Llama; chosen and rejected are columns that the rows happen to have
        "data__task": "preference",
        "data__max_length": 24,
        "data__prompt": "text",
        "data__chosen": "label",
        "data__rejected": "site",
        "method__train__objective": {"loss": "dpo"},
    },
    "experts gate with owners, by depth": {
        "method__type": "experts",
        "method__experts": {
            **small.HALVES,
            "gate": {"rounds": 1, "owner": 1.0, "depth": True},
        },
    },
    "causal packed": {
        "data__task": "instruct",
        "data__prompt": "label",
        "data__response": "text",
        "data__max_length": 56,
        "method__train": {"lr": 0.01, "steps": 3, "batch": 3, "accumulate": 2, "bucket": 2, "packing": True},
    },
    "step quantize": {"chain": [{"step": "quantize", "bits": 4}]},
    "step dither": {"chain": [{"step": "dither"}]},
    "step deadzone": {"chain": [{"step": "deadzone", "error_feedback": True}]},
    "step topk": {"chain": [{"step": "topk", "keep": 0.1, "error_feedback": True}]},
    "step auto": {"chain": [{"step": "auto"}]},
    "train slices": {"method__adapter": {"kind": "lora", "rank": 2, "slices": 2}},
    "rule hft": {"aggregate": {"rule": "hft"}},
    "start olora": {"method__lora_start": "olora", "aggregate": {"rule": "median"}},
    "rule median": {"aggregate": {"rule": "median"}},
    "rule trimmed": {"aggregate": {"rule": "trimmed", "trim": 0.25}},
    "rule krum": {"aggregate": {"rule": "krum", "faulty": 0, "chosen": 2}},
    "rule clipped": {"aggregate": {"rule": "clipped", "bound": 0.1}},
    "partition dirichlet": {"partition": {"by": "dirichlet", "alpha": 0.5, "clients": 3}},
    "partition column": {"partition": {"by": "column", "column": "site", "clients": 4}},
    "partition shards": {"partition": {"by": "shards", "shards_per_client": 2, "clients": 3}},
    "partition size": {"partition": {"by": "size", "clients": 3}},
    "train sgd": {
        "method__train": {
            "optimizer": "sgd",
            "lr": 0.1,
            "momentum": 0.9,
            "steps": 0,
            "epochs": 1,
            "batch": 8,
            "prox": 0.1,
        }
    },
    "train cosine": {
        "method__train": {
            "lr": 0.01,
            "steps": 2,
            "batch": 4,
            "schedule": "cosine",
            "warmup": 0.2,
            "clip": 1.0,
        }
    },
    "server adagrad": {"method__server": {"optimizer": "adagrad", "lr": 0.01}},
    "sampled": {"sampling": {"fraction": 0.5}},
}
RECIPES = METHODS | MORE


def model_of(name: str, folder: Path) -> Path:
    """A Llama for causal-lm, a BERT for the rest; made once a folder."""
    place = folder / ("llama" if name.startswith("causal ") else "bert")
    return place if place.exists() else (tiny.llama(place) if place.name == "llama" else tiny.bert(place))


def end_of(name: str, folder: Path, data: Path, root: Path) -> dict[str, Any]:
    """The hash of a recipe's last state, and the root of its sum of squares, which another processor changes
    in its last digits only."""
    run, result, _ = small.play(small.recipe(model_of(name, folder), data, **RECIPES[name]), root)
    return found_in(run, result)


def found_in(run: small.RunFolder, result: Mapping[str, Any]) -> dict[str, Any]:
    state, _ = load_state(run, result["rounds"], "")
    size = float(
        np.sqrt(sum(float(np.square(value.astype(np.float64)).sum()) for value in state.shared.values()))
    )
    return {"state_sha256": result["state_sha256"], "norm": size}


def require_known(name: str, found: Mapping[str, Any]) -> None:
    """What is recorded of a recipe: its bytes on this processor or, where it has none, its numbers."""
    known = json.loads(FILE.read_text())["ends"][name]
    if not name.startswith("fedkseed"):  # whose numbers are differences of losses: they magnify last digits
        assert abs(found["norm"] - known["norm"]) <= 0.02 * known["norm"], (name, found)
    assert found["state_sha256"] == known["state_sha256"].get(machine(), found["state_sha256"]), name


def machine() -> str:
    """What the bits of a sum depend on besides the recipe."""
    words = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith(("model name", "cpu family", "model\t"))
    ]
    return " / ".join([*dict.fromkeys(words), torch.backends.cpu.get_cpu_capability(), torch.__version__])


def main() -> None:
    """Hashes of other machines stay, but for recipes named as arguments, whose change is meant."""
    ends = json.loads(FILE.read_text())["ends"]
    with tempfile.TemporaryDirectory() as folder:
        data = small.write_rows(Path(folder))
        for name in RECIPES:
            found = end_of(name, Path(folder), data, Path(folder, "runs", name))
            others = {} if name in sys.argv[1:] else ends.get(name, {}).get("state_sha256", {})
            hashes = {**others, machine(): found["state_sha256"]}
            ends[name] = {"norm": found["norm"], "state_sha256": dict(sorted(hashes.items()))}
    FILE.write_text(json.dumps({"ends": ends}, indent=1) + "\n")


if __name__ == "__main__":
    main()

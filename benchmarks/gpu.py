"""What fedtune does on a GPU: the right numbers first, then what they cost beside the memory, beside forward passes and
beside plain loops. Ten minutes on one card.

    python benchmarks/gpu.py [--device cuda] [--only NAME ...] [--tiny]

zeroth    FedKSeed: bits, passes over weights, steps (on_gpu/zeroth.py)
lora      local steps against a plain peft loop: gradients, time, memory (on_gpu/training.py)
together  eight clients in one pass
scoring   against plain forward passes
cut       hidden states as bytes (on_gpu/cut.py)
several   a process on each of several GPUs against one (on_gpu/several.py)

Models have real shapes and random values: nothing is downloaded. 40 GB of the GPU's memory are enough. It has not been
run on a GPU yet; `--device cpu --tiny` shows that it runs. A part that fails says so, and the next one goes on.
"""

from __future__ import annotations

import argparse
import json
import time
import traceback
from collections.abc import Callable, Iterator

import torch
from on_gpu.cut import cut
from on_gpu.several import several
from on_gpu.training import lora, scoring, together
from on_gpu.zeroth import zeroth

Part = Callable[[torch.device, bool], Iterator[dict[str, object]]]
PARTS: dict[str, Part] = {part.__name__: part for part in (zeroth, lora, together, scoring, cut, several)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", nargs="*", choices=PARTS, default=list(PARTS), metavar="NAME")
    parser.add_argument(
        "--tiny",
        action="store_true",
        help="the smallest sizes: shows that the script runs, its figures mean nothing",
    )
    options = parser.parse_args()
    device, tiny = torch.device(options.device), options.tiny
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "no GPU"
    print(f"{name}, torch {torch.__version__}\n")
    found, failed = [], []
    for part in options.only:
        began = time.perf_counter()
        try:
            found += PARTS[part](device, tiny)
        except Exception:  # what other parts find is wanted all the same
            traceback.print_exc()
            failed.append(part)
        if device.type == "cuda":
            torch.cuda.empty_cache()
        print(f"{part}: {time.perf_counter() - began:.0f} s\n", flush=True)
    print(json.dumps(found))
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()

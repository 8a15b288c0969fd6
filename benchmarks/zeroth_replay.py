"""Rebuilding a model from its accumulators, next to the loop that FedKSeed's authors published and to one
pass over the memory.

Claims: a Hadamard pool's replay takes at most 1.5 times as long as np.add(w, 1.0) over the same array, for K
= 1,024 and K = 65,536 alike;
independent signs take at most 0.1 ns per parameter and seed; both at least 5,000 and 10 times less than the
published loop. CPU time of one thread,
the best of several turns, over the tensors of a Llama of 97.5 M parameters.

The published loop is written anew here in plain torch: for each seed, for each tensor, w = w - lr * (g *
normal(seed) + decay * w). It is run for
two seeds; K seeds are that many times as long, because the loop has no other work.

    python benchmarks/zeroth_replay.py [--full | --tiny]
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from functools import partial

import numba
import numpy as np
import torch
from claims import at_least, at_most
from transformers import LlamaConfig, LlamaForCausalLM

from fedtune.zeroth import Layout, Pool, project, replay

SEEDS = 2  # that the published loop is run for
SHAPE = {
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "vocab_size": 16384,
}
TINY = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 512,
}


def aligned(count: int) -> np.ndarray:
    """float32 that begin at a multiple of 64 bytes, as torch's tensors do."""
    room = np.empty(count + 16, np.float32)
    return room[-room.ctypes.data // 4 % 16 :][:count]


def views(flat: np.ndarray, layout: Layout, shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """The tensors of a model as parts of one array, so that np.add and replay move the same memory."""
    return {
        name: torch.from_numpy(flat[at : at + layout.sizes[name]]).view(shapes[name])
        for name, at in layout.offsets.items()
    }


def reference(
    named: dict[str, torch.Tensor], seeds: int, lr: float = 3e-7, g: float = 20.0, decay: float = 0.0
) -> None:
    """The published replay, as it is: fresh normal numbers a tensor and seed, and new tensors for every
    weight."""
    for seed in range(seeds):
        torch.manual_seed(seed)
        for name in named:
            z = torch.normal(mean=0, std=1, size=named[name].size())
            named[name] = named[name] - lr * (g * z + decay * named[name])


def turns(works: dict[str, Callable[[], object]], count: int) -> dict[str, float]:
    """Seconds of CPU of each, the best of `count` turns; the works take turns, so that a busy machine hits
    all alike."""
    best = dict.fromkeys(works, float("inf"))
    for _ in range(count):
        for name, work in works.items():
            start = time.process_time()
            work()
            best[name] = min(best[name], time.process_time() - start)
    return best


def accumulators(size: int) -> np.ndarray:
    return np.random.default_rng(size).integers(-(2**20), 2**20, size)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--full",
        action="store_true",
        help="more turns, independent pools over all parameters and not a sixteenth, 40 pools at once",
    )
    parser.add_argument(
        "--tiny",
        action="store_true",
        help="the smallest sizes: shows that the script runs, its figures mean nothing",
    )
    options = parser.parse_args()
    full = options.full
    torch.set_num_threads(1)
    with torch.device("meta"):
        shapes = {
            name: tuple(value.shape)
            for name, value in LlamaForCausalLM(
                LlamaConfig(tie_word_embeddings=True, **(TINY if options.tiny else SHAPE))
            ).named_parameters()
        }
    layout = Layout.of(shapes)
    base, out = aligned(layout.count), aligned(layout.count)
    np.random.default_rng(0).standard_normal(dtype=np.float32, out=base)
    first, last = views(base, layout, shapes), views(out, layout, shapes)
    pools = {size: Pool(1, size) for size in (1024, 4096, 65536)}
    many = [(Pool(key, 4096), accumulators(4096)) for key in range(40 if full else 5)]
    count = layout.count if full else layout.count // 16
    part = {"x": torch.from_numpy(base[:count])}
    moved = {"x": torch.empty(count)}
    signs, normal = Pool(1, 1024, "independent"), Pool(1, 64, "independent", "gaussian")
    print(
        f"{platform.processor() or platform.machine()}, numba {numba.__version__}, torch "
        f"{torch.__version__}, one thread; {layout.count:,} parameters\n"
    )

    works: dict[str, Callable[[], object]] = {
        "np.add": lambda: np.add(base, 1.0, out=out),
        "np.add, new array": lambda: np.add(base, 1.0),
    }
    for size, pool in pools.items():
        works[f"K {size}"] = partial(replay, last, [(pool, accumulators(size))], 1e-9, base=first)
    turns(works, 1)  # the first touch of the pages
    found = turns(works, 40 if full else 2 if options.tiny else 15)
    found |= turns(
        {
            "many": lambda: replay(last, many, 1e-9, base=first),
            "project": lambda: project(first, pools[4096]),
        },
        2,
    )
    found |= turns({"signs": lambda: replay(moved, [(signs, accumulators(1024))], 1e-9, base=part)}, 2)
    found |= turns({"normal": lambda: replay(moved, [(normal, accumulators(64))], 1e-9, base=part)}, 2)
    found |= turns({"reference": lambda: reference(dict(first), SEEDS)}, 2)
    floor, each, each_normal = found["np.add"], found["signs"] / 1024 / count, found["normal"] / 64 / count
    each_reference = found["reference"] / SEEDS / layout.count

    print(f"{'CPU time':<58}{'ms':>12}{'of np.add':>12}{'ns/(param seed)':>17}")
    for name, text in (
        ("np.add", "np.add(w, 1.0, out=o): the floor"),
        ("np.add, new array", "np.add(w, 1.0), which also allocates"),
    ):
        print(f"{text:<58}{1e3 * found[name]:>12,.1f}{found[name] / floor:>12.2f}")
    for size in pools:
        taken = found[f"K {size}"]
        print(
            f"{f'Hadamard pool, K = {size:,}':<58}{1e3 * taken:>12,.1f}{taken / floor:>12.2f}{1e9 * taken / size / layout.count:>17.6f}"
        )
    print(
        f"{f'{len(many)} Hadamard pools of 4,096 in one pass':<58}{1e3 * found['many']:>12,.1f}{found['many'] / floor:>12.2f}"
    )
    print(
        f"{'projection onto a Hadamard pool of 4,096':<58}{1e3 * found['project']:>12,.1f}{found['project'] / floor:>12.2f}"
    )
    share = "" if full else ", a sixteenth of the parameters"
    for text, key, rate in (
        (f"independent signs, 1,024 seeds{share}", "signs", each),
        (f"independent normal table, 64 seeds{share}", "normal", each_normal),
    ):
        print(f"{text:<58}{1e3 * found[key]:>12,.1f}{'':>12}{1e9 * rate:>17.4f}")
    print(
        f"{f'the published loop, {SEEDS} seeds':<58}{1e3 * found['reference']:>12,.1f}{found['reference'] / floor:>12.2f}{1e9 * each_reference:>17.4f}"
    )
    for size in pools:
        print(
            f"{f'  the same for K = {size:,}, extrapolated':<58}{1e3 * each_reference * size * layout.count:>12,.0f}"
        )
    whole = each_reference * 1024 * layout.count
    print()
    print(
        json.dumps(
            [
                at_most(
                    "seconds of a Hadamard replay, K = 1,024, other: np.add into an array",
                    found["K 1024"],
                    floor,
                    1.5,
                ),
                at_most(
                    "seconds of a Hadamard replay, K = 65,536, other: np.add into an array",
                    found["K 65536"],
                    floor,
                    1.5,
                ),
                at_most("ns per parameter and seed of independent signs, other: goal", 1e9 * each, 0.1, 1.0),
                at_least(
                    "seconds of a Hadamard replay, K = 1,024, other: published loop, extrapolated from 2 "
                    "seeds",
                    found["K 1024"],
                    whole,
                    5000,
                ),
                at_least(
                    "ns per parameter and seed of independent signs, other: published loop",
                    1e9 * each,
                    1e9 * each_reference,
                    10,
                ),
            ]
        )
    )


if __name__ == "__main__":
    main()

"""One local step of FedKSeed next to its two forward passes, in time and in memory, and next to the published
optimiser.

Claims: a step takes at most 1.10 times as long as its two forward passes over 128 tokens, and its peak memory
is at most 16 MB above theirs.
A step is what a walk repeats: forward, move, forward, move, where the second move ends this step and begins
the next; a walk's first move is not
counted. CPU time of one thread on a Llama with random weights: 9.6 M parameters, or 97.5 M with --full.
Memory is the peak of the resident set
(VmHWM of Linux, reset before each part), each case in a process of its own.

The published optimiser (MeZO's loop as in FedKSeed's code) is written anew here in plain torch: a tensor of
normal numbers for each perturbation.

    python benchmarks/zeroth_step.py [--full | --tiny]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numba
import torch
from claims import claim
from transformers import LlamaConfig, LlamaForCausalLM

from fedtune.zeroth import Pool, views, walk

LENGTH, EPS, LR = 128, 5e-4, 3e-7
MEGABYTE = 1e6
SHAPES: dict[str, dict[str, int]] = {
    "tiny": {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "vocab_size": 1024,
    },
    "10M": {
        "hidden_size": 256,
        "intermediate_size": 704,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "vocab_size": 12288,
    },
    "100M": {
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 12,
        "vocab_size": 16384,
    },
}
CASES = ("hadamard", "independent", "normal", "published")
POOLS = {
    "hadamard": Pool(1, 4096),
    "independent": Pool(1, 4096, "independent"),
    "normal": Pool(1, 4096, "independent", "gaussian"),
}


class TunableModel:
    """A model, one batch, and what may be done with them."""

    def __init__(self, size: str) -> None:
        torch.manual_seed(0)
        self.net = LlamaForCausalLM(LlamaConfig(tie_word_embeddings=True, **SHAPES[size])).eval()
        self.named = dict(self.net.named_parameters())
        self.seen = views(self.named)
        self.batch = torch.randint(0, 1000, (1, LENGTH))
        self.count = sum(value.numel() for value in self.named.values())

    def loss(self) -> float:
        with torch.no_grad():
            return float(self.net(input_ids=self.batch, labels=self.batch).loss)

    def forwards(self) -> None:
        self.loss()
        self.loss()

    def ours(self, pool: Pool) -> None:
        """SPSA in place (MeZO, algorithm 1), from w + eps z of one direction to w' + eps z' of the next."""
        above = self.loss()
        walk(self.seen, pool, [(77, -2 * EPS)])
        walk(self.seen, pool, [(77, EPS - LR * (above - self.loss()) / (2 * EPS)), (78, EPS)])

    def published(self, decay: float = 0.0) -> None:
        def move(times: int) -> None:
            torch.manual_seed(77)
            for value in self.named.values():
                z = torch.normal(mean=0, std=1, size=value.data.size(), dtype=value.data.dtype)
                value.data = value.data + times * z * EPS

        move(1)
        above = self.loss()
        move(-2)
        g = (above - self.loss()) / (2 * EPS)
        move(1)
        torch.manual_seed(77)
        for value in self.named.values():
            z = torch.normal(mean=0, std=1, size=value.data.size(), dtype=value.data.dtype)
            value.data = value.data - LR * (g * z + decay * value.data)

    def work(self, case: str) -> Callable[[], None]:
        return self.published if case == "published" else lambda: self.ours(POOLS[case])


def peak(work: Callable[[], None]) -> float:
    """Bytes of the largest resident set while it runs."""
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins again at what is resident now
    work()
    line = next(
        line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")
    )
    return 1024.0 * int(line.split()[1])


def memory(size: str, case: str) -> dict[str, float]:
    """Peak above that of two forward passes, and the peak of what numpy and Python allocate, in MB."""
    tunable = TunableModel(size)
    work = tunable.work(case)
    tunable.forwards()
    work()  # compiled, loaded and touched: what comes now comes with every step
    above = peak(work) - peak(tunable.forwards)
    tracemalloc.start()
    work()
    traced = tracemalloc.get_traced_memory()[1]
    return {"above": above / MEGABYTE, "traced": traced / MEGABYTE}


def measured(size: str, case: str) -> dict[str, float]:
    """`memory` in a process whose allocator gives back what is freed, so that a peak is what was held at
    once."""
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, __file__, "--memory", size, case],
        env=env,
        capture_output=True,
        text=True,
        check=True,
    )
    found: dict[str, float] = json.loads(done.stdout)
    return found


def turns(works: dict[str, Callable[[], None]], count: int) -> dict[str, float]:
    """Seconds of CPU of each, the best of `count` turns; the works take turns, so that a busy machine hits
    all alike."""
    best = dict.fromkeys(works, float("inf"))
    for turn in range(count + 1):
        for name, work in works.items():
            start = time.process_time()
            work()
            if turn:  # the first is not counted
                best[name] = min(best[name], time.process_time() - start)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--full", action="store_true", help="97.5 M parameters instead of 9.6 M")
    parser.add_argument(
        "--tiny",
        action="store_true",
        help="the smallest sizes: shows that the script runs, its figures mean nothing",
    )
    parser.add_argument(
        "--memory", nargs=2, metavar=("SIZE", "CASE"), help=argparse.SUPPRESS
    )  # one case, in a process of its own
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.memory:
        print(json.dumps(memory(*arguments.memory)))
        return
    size = "100M" if arguments.full else "tiny" if arguments.tiny else "10M"
    cases = CASES[:1] + CASES[-1:] if arguments.tiny else CASES
    tunable = TunableModel(size)
    print(
        f"{platform.processor() or platform.machine()}, numba {numba.__version__}, torch "
        f"{torch.__version__}, one thread; ",
        end="",
    )
    print(f"{tunable.count:,} parameters ({4 * tunable.count / MEGABYTE:,.0f} MB), {LENGTH} tokens\n")
    found = turns(
        {"forwards": tunable.forwards} | {case: tunable.work(case) for case in cases},
        1 if arguments.tiny else 10 if arguments.full else 12,
    )
    measure = memory if arguments.tiny else measured  # figures of a tiny case mean nothing, wherever it runs
    held = {case: measure(size, case) for case in cases}
    print(f"{'':<44}{'ms':>9}{'of two forwards':>17}{'MB above them':>15}{'traced MB':>11}")
    print(f"{'two forward passes':<44}{1e3 * found['forwards']:>9,.1f}{1:>17.3f}")
    texts = dict(
        zip(
            CASES,
            (
                "step, Hadamard pool",
                "step, independent signs",
                "step, independent normal table",
                "step, published optimiser",
            ),
            strict=True,
        )
    )
    for case in cases:
        ratio = found[case] / found["forwards"]
        print(
            f"{texts[case]:<44}{1e3 * found[case]:>9,.1f}{ratio:>17.3f}{held[case]['above']:>15.1f}{held[case]['traced']:>11.2f}"
        )
    two, ours, other = found["forwards"], found["hadamard"], found["published"]
    above, theirs = held["hadamard"]["above"], held["published"]["above"]
    print()
    print(
        json.dumps(
            [
                claim(
                    f"seconds of a step, Hadamard pool, {size}, other: its two forward passes",
                    ours,
                    two,
                    ours / two,
                    "<= 1.10",
                    ours <= 1.1 * two,
                ),
                claim(
                    "seconds of a step, Hadamard pool, other: published optimiser",
                    ours,
                    other,
                    other / ours,
                    ">= 1.5",
                    other >= 1.5 * ours,
                ),
                claim(
                    f"MB of peak memory above two forwards, {size}, other: published",
                    above,
                    theirs,
                    above / theirs if theirs else 1.0,  # a tiny case may take no page
                    "<= 16 MB",
                    above <= 16,
                ),
            ]
        )
    )


if __name__ == "__main__":
    main()

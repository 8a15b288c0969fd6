"""Adapters to one adapter: how fast, in how much memory, and what the product space costs.

Claims: on one core the streaming mean of r = 16 adapters on a 7B model's shapes keeps up with what a 10
Gbit/s link can bring
(1.25 GB/s), for 8, 100 and 1,000 clients, next to a plain memory copy (a sum in float64 moves 20 bytes a
value, a copy 8); the whole
road of an answer, from the bytes of a message to the running sum (`cohort.sum`: checksum, checks, float64,
sum), keeps up as well, next
to the SHA-256 of the same bytes, which every message pays; the memory of the mean, and of the whole road,
does not depend on the number of
clients; FlexLoRA's rule through thin QR is at least ten times as fast as the dense SVD of the same module,
and says the same.

    python benchmarks/aggregate.py [--full | --tiny]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before numpy: one core for both sides

import numpy as np
from claims import claim

from fedtune.aggregate import RULES, ClientAdapter, Combined, Pair, WeightedMean, split
from fedtune.methods.fedpeft import FedPEFT
from fedtune.methods.fedpeft_settings import FedPEFTSettings
from fedtune.runtime.cohort import RoundCohort
from fedtune.runtime.protocol import Ask, Link, Reply
from fedtune.schema import Schema
from fedtune.transforms import Chain
from fedtune.types import Round, Update
from fedtune.wire import encode

RANK, HIDDEN, INNER, LAYERS = 16, 4096, 11008, 32  # Llama-7B, every linear of its blocks
LINEARS = {
    "q": (HIDDEN, HIDDEN),
    "k": (HIDDEN, HIDDEN),
    "v": (HIDDEN, HIDDEN),
    "o": (HIDDEN, HIDDEN),
    "gate": (INNER, HIDDEN),
    "up": (INNER, HIDDEN),
    "down": (HIDDEN, INNER),
}
COHORTS = (8, 100, 1000)
LINK = 1.25  # GB/s: 10 Gbit/s
ROAD_LAYERS = 8  # of 40 MB in all, beside which what numpy and the allocator keep is small
POOL = 4  # different adapters that are given out in turn
Tensors = dict[str, np.ndarray]


def adapter(layers: int, seed: int) -> Tensors:
    rng = np.random.default_rng(seed)
    made: Tensors = {}
    for layer in range(layers):
        for name, (d, k) in LINEARS.items():
            made[f"layers.{layer}.{name}.lora_A.weight"] = rng.standard_normal((RANK, k), np.float32)
            made[f"layers.{layer}.{name}.lora_B.weight"] = rng.standard_normal((d, RANK), np.float32)
    return made


def averaged(answers: Iterator[Tensors]) -> Tensors:
    total = WeightedMean()
    for number, tensors in enumerate(answers):
        total.add(tensors, 1.0 + number % 5)
    return total.mean()


def copied(answers: Iterator[Tensors]) -> None:
    held: Tensors = {}
    for tensors in answers:
        held = held or {name: np.empty_like(value) for name, value in tensors.items()}
        for name, value in tensors.items():
            np.copyto(held[name], value)


def seconds(work: Callable[[], Any], turns: int) -> float:
    best = float("inf")
    for _ in range(turns):
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return best


def speeds(layers: int, cohorts: Sequence[int], claims: list[dict[str, Any]]) -> None:
    pool = [adapter(layers, seed) for seed in range(POOL)]
    size = sum(value.nbytes for value in pool[0].values())
    print(
        f"streaming mean, r = {RANK}, {layers} of {LAYERS} layers: {size / 1e6:.0f} MB an "
        f"adapter\n{'clients':>8}{'mean GB/s':>12}{'copy GB/s':>12}{'ratio':>8}"
    )
    for clients in cohorts:
        turns = 3 if clients < 1000 else 1
        ours = (
            clients
            * size
            / 1e9
            / seconds(lambda n=clients: averaged(pool[i % POOL] for i in range(n)), turns)
        )  # type: ignore[misc]
        copy = (
            clients * size / 1e9 / seconds(lambda n=clients: copied(pool[i % POOL] for i in range(n)), turns)
        )  # type: ignore[misc]
        print(f"{clients:>8}{ours:>12.2f}{copy:>12.2f}{ours / copy:>8.2f}")
        claims.append(
            claim(
                f"GB/s of adapters averaged, {clients} clients, other: memory copy",
                ours,
                copy,
                ours / copy,
                f"ours >= {LINK}",
                ours >= LINK,
            )
        )


def messages(layers: int, cohorts: Sequence[int], claims: list[dict[str, Any]]) -> None:
    """The server's whole work on answers without a chain; messages are made outside of the clock, as clients
    would."""
    pool = [adapter(layers, seed) for seed in range(POOL)]
    size = sum(value.nbytes for value in pool[0].values())
    print(
        f"\nfrom messages to the sum, {layers} "
        f"layers\n{'clients':>8}{'cohort GB/s':>12}{'SHA-256 GB/s':>14}{'ratio':>8}"
    )
    for clients in cohorts:
        ours = clients * size / 1e9 / min(road(pool, clients) for _ in range(3))
        flat = np.concatenate([value.reshape(-1) for value in pool[0].values()]).tobytes()
        floor = size / 1e9 / seconds(lambda flat=flat: hashlib.sha256(flat).digest(), 5)  # type: ignore[misc]
        print(f"{clients:>8}{ours:>12.2f}{floor:>14.2f}{ours / floor:>8.2f}")
        claims.append(
            claim(
                f"GB/s from messages to the sum, {clients} clients, other: SHA-256 alone",
                ours,
                floor,
                ours / floor,
                f"ours >= {LINK}",
                ours >= LINK,
            )
        )


def road(pool: Sequence[Tensors], clients: int) -> float:
    """Seconds of one `cohort.sum` over plain float32 answers, without those in which the messages are
    made."""
    link = Link("0" * 16, "0" * 64, FedPEFT(FedPEFTSettings(), 1), Chain([]))
    now, schema, spent = Round(1, 0, tuple(range(clients))), Schema.of(pool[0]), 0.0
    updates = [Update.of(tensors, 1.0 + number, {"loss": 1.0}) for number, tensors in enumerate(pool)]

    def transport(asks: Sequence[Ask]) -> Iterable[Reply]:
        nonlocal spent
        for ask in asks:
            start = time.perf_counter()
            payload = encode(
                updates[ask.client % len(updates)], link.header("train", ask.client, now, schema)
            )
            spent += time.perf_counter() - start
            yield Reply(ask.client, payload)

    cohort = RoundCohort(
        link, now, transport, lambda event: None, {client: str(client) for client in now.members}
    )
    start = time.perf_counter()
    cohort.sum("train", pool[0])
    return time.perf_counter() - start - spent


def memory(layers: int, cohorts: Sequence[int], claims: list[dict[str, Any]]) -> None:
    """Peak memory of processes of their own: of the mean alone, every client's adapter a new one; and of
    `cohort.sum`, every message a new one."""
    sums = ("peak", layers, cohorts[0], cohorts[-1] if layers <= 2 else cohorts[1], "the mean alone")
    roads = ("peak-road", max(layers, ROAD_LAYERS), cohorts[0], 8 * cohorts[0], "from messages to the sum")
    print("\npeak resident memory")
    for option, deep, less, more, what in (sums, roads):
        few, many = (peak(option, deep, clients) for clients in (less, more))
        print(f"{what}, {deep} layers: {few / 1e6:.0f} MB for {less} clients, {many / 1e6:.0f} MB for {more}")
        text = f"MB resident at the peak with {more} clients, {what}, other: with {less}"
        claims.append(claim(text, many / 1e6, few / 1e6, many / few, "<= 1.05", many <= 1.05 * few))


def peak(option: str, layers: int, clients: int) -> int:
    run = subprocess.run(
        [sys.executable, __file__, f"--{option}", str(layers), str(clients)],
        capture_output=True,
        text=True,
        check=True,
    )
    return int(run.stdout)


def high_water() -> int:
    """Bytes. Linux's ru_maxrss starts at what the parent held when it forked, so its own mark is read where
    there is one."""
    status = Path("/proc/self/status")
    if status.exists():
        return next(
            int(line.split()[1]) * 1024
            for line in status.read_text().splitlines()
            if line.startswith("VmHWM")
        )
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def fresh(layers: int, clients: int) -> Iterator[Tensors]:
    first = adapter(layers, 0)
    for _ in range(clients):
        yield {name: value.copy() for name, value in first.items()}


def refactoring(size: int, clients: int, claims: list[dict[str, Any]]) -> None:
    """One module: the mean product of all clients, cut to rank 16, both ways."""
    rng = np.random.default_rng(0)

    def one() -> Tensors:
        return {
            "m.lora_A.weight": rng.standard_normal((RANK, size), np.float32),
            "m.lora_B.weight": rng.standard_normal((size, RANK), np.float32),
        }

    before, answers = Combined(one()), [ClientAdapter(i, one(), 1.0 + i, 2.0) for i in range(clients)]
    rule = RULES["flexlora"]()
    start = time.perf_counter()
    made = rule.combine(answers, before, 2.0, Round(1, 0, ()))
    ours = time.perf_counter() - start
    start = time.perf_counter()
    reference = dense(answers, 2.0)
    other = time.perf_counter() - start
    pair = split(made.tensors)[0]["m"]
    wanted = reference.B @ reference.A
    error = float(np.linalg.norm(pair.B @ pair.A - wanted) / np.linalg.norm(wanted))
    print(
        f"\none {size} x {size} module, {clients} clients of rank {RANK}: thin QR {ours:.3f} s, dense "
        f"float32 SVD {other:.1f} s, apart by {error:.1e}"
    )
    claims.append(
        claim(
            f"seconds for one {size} x {size} module, {clients} clients, other: dense SVD",
            ours,
            other,
            ours / other,
            "<= 0.1",
            ours <= 0.1 * other,
        )
    )
    claims.append(
        claim(
            "relative distance of both results, other: goal", error, 1e-5, error / 1e-5, "<= 1", error <= 1e-5
        )
    )


def dense(answers: list[ClientAdapter], scale: float) -> Pair:
    """As FlexLoRA's code does it: the product as a matrix, all of its singular values."""
    total = sum(answer.weight for answer in answers)
    product = sum(
        np.float32(a.weight / total * a.scale) * (a.tensors["m.lora_B.weight"] @ a.tensors["m.lora_A.weight"])
        for a in answers
    )
    u, s, vt = np.linalg.svd(np.asarray(product), full_matrices=False)
    root = np.sqrt(s[:RANK] / np.float32(scale))
    return Pair(u[:, :RANK] * root, root[:, None] * vt[:RANK])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--full", action="store_true", help="all 32 layers and a 4096 x 4096 module: minutes")
    parser.add_argument(
        "--tiny",
        action="store_true",
        help="the smallest sizes: shows that the script runs, its figures mean nothing",
    )
    parser.add_argument("--peak", nargs=2, type=int, help=argparse.SUPPRESS)
    parser.add_argument("--peak-road", nargs=2, type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak:
        averaged(fresh(*arguments.peak))
    if arguments.peak_road:
        road([adapter(arguments.peak_road[0], 0)], arguments.peak_road[1])
    if arguments.peak or arguments.peak_road:
        print(high_water())
        return
    machine = platform.processor() or platform.machine()
    print(f"{machine}, one thread, Python {platform.python_version()}, numpy {np.__version__}\n")
    claims: list[dict[str, Any]] = []
    layers, size = (LAYERS, 4096) if arguments.full else (1, 64) if arguments.tiny else (2, 2048)
    cohorts = (2, 3) if arguments.tiny else COHORTS
    speeds(layers, cohorts, claims)
    messages(layers, cohorts[:2], claims)
    memory(layers, cohorts, claims)
    refactoring(size, 10, claims)
    print()
    print(json.dumps(claims))


if __name__ == "__main__":
    main()

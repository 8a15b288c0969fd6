"""What a federation in one process costs over the training itself: wall clock and peak memory, each in its
own process.

plain   a torch loop over the very same batches, peft and AdamW by hand: no federation, no fedtune
local   fedtune's local cohort
flower  the same recipe on Flower's simulation engine (Ray); only with --flower

python benchmarks/simulation.py [--full | --tiny] [--flower]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from claims import at_most

BATCH, RATE, LENGTH = 8, 3e-3, 32


def overrides(clients: int, rounds: int, steps: int) -> list[str]:
    """The built-in federation without scores and comparisons."""
    changes = {
        "partition.clients": clients,
        "partition.by": "iid",
        "rounds": rounds,
        "method.train.steps": steps,
        "method.train.batch": BATCH,
    }
    changes |= {
        "method.train.lr": RATE,
        "data.max_length": LENGTH,
        "method.train.clip": 0.0,
        "data.test_share": 0.01,
        "model.threads": 1,
        "method.train.head_lr": 0.0,
        "method.adapter.last": 0,
        "method.adapter.keep_front": False,
        "method.head_start": "random",  # a question before the first round, which the plain loop has not
    }
    off = ["evaluate.base=false", "evaluate.local=false", "evaluate.centralised=false"]
    return [f"{path}={json.dumps(value)}" for path, value in changes.items()] + off


def plain(clients: int, rounds: int, steps: int) -> float:
    """Seconds of the training loop alone: the same model, rows, adapter and number of steps, written by
    hand."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from fedtune.config import read
    from fedtune.data import load
    from fedtune.hf.config import locate
    from fedtune.model.fit import step_batches
    from fedtune.rng import seed_of

    recipe = read(None, overrides(clients, rounds, steps))
    federation = load(recipe.data, recipe.partition, recipe.seed)
    place = locate(recipe.model.name)
    tokenizer = AutoTokenizer.from_pretrained(place)
    model = AutoModelForSequenceClassification.from_pretrained(place, num_labels=len(federation.labels))
    model = get_peft_model(
        model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="SEQ_CLS")
    ).train()
    trained = [value for value in model.parameters() if value.requires_grad]
    texts = [
        tokenizer([row["text"] for row in client.train], truncation=True, max_length=LENGTH)["input_ids"]
        for client in federation.clients
    ]
    labels = [
        torch.tensor([federation.labels.index(row["label"]) for row in client.train])
        for client in federation.clients
    ]
    torch.set_num_threads(1)  # as the recipe does: two threads on shared cores measure the neighbours
    began = time.perf_counter()
    for number in range(1, rounds + 1):
        for client in range(clients):
            optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)
            seed = seed_of("train", recipe.seed, number, client)
            for (chosen,) in step_batches(len(labels[client]), recipe.method.train, seed):
                batch = tokenizer.pad({"input_ids": [texts[client][i] for i in chosen]}, return_tensors="pt")
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(
                    model(**batch).logits, labels[client][list(chosen)]
                ).backward()
                optimizer.step()
    return time.perf_counter() - began


def ours(engine: str, clients: int, rounds: int, steps: int) -> float:
    """Seconds from the first round's start to the last round's commit, as the journal has them."""
    from fedtune.cli import main

    with tempfile.TemporaryDirectory() as runs:
        sets = [f"--set={change}" for change in overrides(clients, rounds, steps)]
        one = ["--workers", "1"] if engine == "local" else []  # as the plain loop: one process
        if main(["simulate", "--engine", engine, *one, "--runs", runs, *sets]):
            raise SystemExit("the run failed")
        events = [
            json.loads(line) for line in (Path(runs) / "demo" / "events.jsonl").read_text().splitlines()
        ]
        return sum(event["seconds"] for event in events if event["event"] == "RoundDone")


def measure(kind: str, clients: int, rounds: int, steps: int) -> dict[str, float]:
    """Run one kind in a fresh process; seconds of the whole process, of its rounds, and peak memory of it and
    its children."""
    began, peak = time.perf_counter(), 0
    command = [sys.executable, __file__, "--worker", kind, str(clients), str(rounds), str(steps)]
    with tempfile.TemporaryFile("w+") as out:
        process = psutil.Popen(command, stdout=out, stderr=subprocess.STDOUT, text=True)
        while process.poll() is None:
            if kind == "flower":
                peak = max(peak, memory(process))
            time.sleep(0.2)
        seconds = time.perf_counter() - began
        out.seek(0)
        said = out.read()
    if process.returncode:
        raise SystemExit(f"{kind} failed:\n{said[-2000:]}")
    own = json.loads(said.splitlines()[-1])
    return {
        "round_seconds": own["round_seconds"],
        "process_seconds": seconds,
        "peak_bytes": float(peak or own["peak_bytes"]),
    }


def memory(process: psutil.Process) -> int:
    """Proportional set size of a process and all its children, so that what they share counts once.

    Asking costs the asked process time, so only the engine of many processes is measured this way; others
    know their own peak.
    """
    total = 0
    with contextlib.suppress(psutil.Error):
        for one in [process, *process.children(recursive=True)]:
            with contextlib.suppress(psutil.Error):
                total += one.memory_full_info().pss
    return total


def worker(kind: str, clients: int, rounds: int, steps: int) -> None:
    from fedtune.quiet import quiet

    quiet()
    seconds = plain(clients, rounds, steps) if kind == "plain" else ours(kind, clients, rounds, steps)
    print(
        json.dumps(
            {
                "round_seconds": seconds,
                "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            }
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true", help="more steps, and 100 clients too")
    parser.add_argument(
        "--tiny",
        action="store_true",
        help="the smallest sizes: shows that the script runs, its figures mean nothing",
    )
    parser.add_argument("--flower", action="store_true", help="Flower's engine too (minutes)")
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        kind, *numbers = options.worker
        return worker(kind, *map(int, numbers))
    claims: list[dict[str, Any]] = []
    sizes = [(8, 3, 3), (100, 1, 2)] if options.full else [(2, 1, 1)] if options.tiny else [(8, 2, 2)]
    for size in sizes:
        kinds = ["plain", "local"]
        taken: dict[str, list[dict[str, float]]] = {kind: [] for kind in kinds}
        for _ in range(1 if options.tiny else 2):
            for kind in kinds:
                taken[kind].append(measure(kind, *size))
        if options.flower:
            taken["flower"] = [measure("flower", *size)]
        for kind, runs in taken.items():
            middle = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
            print(
                f"{size[0]:>4} clients  {kind:<7} rounds {middle['round_seconds']:7.2f} s  "
                f"process {middle['process_seconds']:7.2f} s  peak {middle['peak_bytes'] / 2**20:7.0f} MiB"
            )
        for key, goal in (("round_seconds", 1.10), ("process_seconds", 1.10), ("peak_bytes", 1.15)):
            mine, other = (statistics.median(run[key] for run in taken[kind]) for kind in ("local", "plain"))
            claims.append(
                at_most(f"local cohort over plain loop, {key}, {size[0]} clients", mine, other, goal)
            )
    print(json.dumps(claims))
    return None


if __name__ == "__main__":
    main()

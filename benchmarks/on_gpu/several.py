"""The local engine with a process on each device against one process: the same bytes, and rounds that take less.

On a CPU the devices are two processes of one thread, which shows that it runs."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from claims import at_least, claim
from llm import TINY, questions, write_model

import fedtune
from fedtune.events import Event, RoundDone
from on_gpu.models import SHAPES

EACH = 0.85  # of a device's speed, that each adds


def several(device: torch.device, tiny: bool) -> Iterator[dict[str, object]]:
    count = torch.cuda.device_count() if device.type == "cuda" else 2
    if count < 2:
        print("one GPU: a process on each of several was not tried")
        return
    with tempfile.TemporaryDirectory() as place:
        folder, rows = Path(place), list(islice(questions(), 32 if tiny else 400))
        shape = dict(TINY if tiny else SHAPES["0.6B"])
        layers = shape.pop("num_hidden_layers", 2)
        write_model(folder / "model", shape, layers, [row["response"] for row in rows])
        taken, hashes = zip(
            *(rounds(folder, rows, workers, count, tiny) for workers in (count, 1)), strict=True
        )
    same = hashes[0] == hashes[1]
    yield claim(
        f"state of a run on {count} devices, other than on one", int(not same), 1, int(not same), "0", same
    )
    print(f"{count} devices: {taken[0]:.1f} s of rounds, one: {taken[1]:.1f}")
    yield at_least(f"seconds of rounds on {count} devices; other: on one", *taken, EACH * count)


def rounds(
    folder: Path, rows: list[dict[str, str]], workers: int, count: int, tiny: bool
) -> tuple[float, str]:
    """Seconds of all rounds after the first, which begins the processes, and the last state's hash."""
    import json

    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe: dict[str, Any] = {
        "seed": 1,
        "rounds": 2 if tiny else 4,
        "model": {"name": str(folder / "model"), "deterministic": True, "threads": 1},
        "data": {"source": "jsonl", "path": str(folder / "rows.jsonl"), "task": "instruct", "max_length": 64},
        "partition": {"by": "iid", "clients": 2 * count},
        "method": {
            "type": "fedpeft",
            "train": {"lr": 1e-4, "batch": 2 if tiny else 8, "steps": 1 if tiny else 10},
        },
        "evaluate": {"base": False, "local": False, "centralised": False},
    }
    found: list[float] = []

    def heard(event: Event) -> None:
        if isinstance(event, RoundDone):
            found.append(event.seconds)

    result = fedtune.simulate(recipe, runs=folder / f"runs-{workers}", workers=workers, on_event=heard)
    return sum(found[1:]), result.state_sha256

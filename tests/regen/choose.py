"""docs/choose.md: its tables, from simulations/results/. One that was not recorded is left out."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from typing import Any

from tests.regen.recorded import ABOUT, SMALL
from tests.regen.results import ROOT, block, figure, mean_of, spread

Runs = list[dict[str, Any]]  # of one row, a run for each seed
Cell = Callable[[Runs], str]
PAGE = "docs/choose.md"


def score(key: str, show: Callable[[list[float]], str] = figure) -> Cell:
    return lambda runs: show([run[key] for run in runs])


def size(unit: int, *keys: str) -> Cell:
    """The mean over seeds of a sum of bytes, in KiB (1024) or MiB."""
    return lambda runs: f"{statistics.mean(sum(run[key] for key in keys) for run in runs) / unit:,.1f}"


KIB, MIB = 1024, 2**20
UP = {"up, KiB a client and round": size(KIB, "up_bytes_per_client_round")}
ACCURACY = {"accuracy": score("federated", spread)}
TABLES: dict[str, tuple[str, dict[str, Cell]]] = {  # block -> recorded table, heading -> cell
    "methods": (
        "fedkseed-clinc150",
        {
            **ACCURACY,
            **UP,
            "down": size(KIB, "down_bytes_per_client_round"),
            "CPU seconds": lambda runs: mean_of(runs, "cpu_seconds"),
            "peak memory, MiB": size(MIB, "peak_rss_bytes"),
        },
    ),
    "split": (
        "sfprompt-clinc150",
        {
            "accuracy": score("accuracy"),
            "messages and cut, MiB a client and round": size(MIB, "message_bytes", "cut_bytes"),
            "a client's FLOPs, of full fine-tuning's": score("client_flops"),
            "a client's memory, MiB, by formula": size(MIB, "client_memory_bytes"),
        },
    ),
    "kinds": ("clinc150-kinds-domains", {**ACCURACY, **UP}),
    "codes": ("shakespeare-codes", {"perplexity": score("federated", spread), **UP}),
    "ranks": ("clinc150-ranks", {**ACCURACY, **UP}),
    "byzantine": ("byzantine", {"test loss, nats": score("loss")}),
}

TITLES = {  # where the recorded table's own title speaks of the one before it
    "clinc150-kinds-domains": "FedPEFT on CLINC150's 150 intents, ten domains are ten clients, six rounds of twelve steps of 16: accuracy",
}


def generate() -> dict[str, str]:
    text = (ROOT / PAGE).read_text(encoding="utf-8")
    for name, (recorded, columns) in TABLES.items():
        text = block(text, name, "\n".join(table(recorded, columns)))
    return {PAGE: text}


def table(recorded: str, columns: dict[str, Cell]) -> list[str]:
    path = ROOT / "simulations" / "results" / f"{recorded}.json"
    if not path.exists():
        return []
    kept = json.loads(path.read_text())
    title = TITLES.get(recorded) or (ABOUT.get(recorded) or SMALL[recorded])[0]
    lines = [f"{title}.", "", "| | " + " | ".join(columns) + " | seeds |", "|" + "---|" * (len(columns) + 2)]
    for name, seeds in kept["rows"].items():
        runs = list(seeds.values())
        lines.append(
            "| " + " | ".join([name, *(cell(runs) for cell in columns.values()), str(len(runs))]) + " |"
        )
    return [*lines, "", f"{kept['hardware']}."]

"""The data of a federation in figures, without a row of it: data.json for programs, data.md for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedtune.config import Recipe
from fedtune.data import Federation, histogram
from fedtune.plain import plain
from fedtune.runtime.folder import RunFolder

FILE, PAGE = "data.json", "data.md"
SHOWN = 12  # labels of a client in the page


def facts_of(recipe: Recipe, federation: Federation) -> dict[str, Any]:
    """Sizes by client, the test set, what was left out, labels, and the SHA-256 of all rows."""
    return {
        "task": recipe.data.task,
        "source": recipe.data.source,
        "partition": recipe.partition.by,
        "fingerprint": federation.fingerprint,
        "clients": [
            {
                "name": client.name,
                "train": len(client.train),
                "held_out": len(client.test),
                "labels": histogram(client.train),
            }
            for client in federation.clients
        ],
        "train": sum(len(client.train) for client in federation.clients),
        "test": len(federation.test),
        "labels": list(federation.labels),
        "left_out": dict(federation.dropped),
        "notes": list(federation.notes),
    }


def write_data_card(folder: RunFolder, recipe: Recipe, federation: Federation) -> None:
    """Nothing where rows are at real sites, which tell nobody about them."""
    if any(client.train for client in federation.clients):
        from fedtune.disk import write_atomic

        facts = facts_of(recipe, federation)
        folder.write_json(FILE, facts)
        write_atomic(folder.path / PAGE, page(facts, folder.path.name).encode())


def data_facts(folder: RunFolder) -> dict[str, Any] | None:
    """What data.json of a run says; None where it has none."""
    return folder.read_json(FILE) if (folder.path / FILE).exists() else None


def page(facts: Mapping[str, Any], run: str) -> str:
    rows = [
        f"| {cell(client['name'])} | {client['train']:,} | {client['held_out']:,} | "
        f"{said(client['labels'])} |"
        for client in facts["clients"]
    ]
    return "\n".join(
        [
            f"# Data of the federation {cell(run)}",
            "",
            "This page has figures only: no row, no text, no image.",
            "",
            f"- task: {facts['task']}; source: {facts['source']}; clients by: {facts['partition']}",
            f"- rows that train: {facts['train']:,} at {len(facts['clients'])} clients; in the test set: "
            f"{facts['test']:,}",
            *([f"- labels: {len(facts['labels'])}"] if facts["labels"] else []),
            *(f"- left out: {count:,} rows ({cell(reason)})" for reason, count in facts["left_out"].items()),
            *(f"- note: {cell(note)}" for note in facts["notes"]),
            f"- SHA-256 of all rows, labels and clients: {facts['fingerprint']}",
            "",
            "| client | rows that train | held out | labels |",
            "|---|---|---|---|",
            *rows,
            "",
        ]
    )


def said(labels: Mapping[str, int]) -> str:
    most = sorted(labels.items(), key=lambda pair: (-pair[1], pair[0]))
    more = f", {len(most) - SHOWN} more" if len(most) > SHOWN else ""
    return ", ".join(f"{cell(label)}: {count:,}" for label, count in most[:SHOWN]) + more


def cell(text: str) -> str:
    """Other people's words in a table."""
    return plain(text, 80).replace("|", "\\|")

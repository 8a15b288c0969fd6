"""docs/tuning.md: its tables, from simulations/results/."""

from __future__ import annotations

from tests.regen.choose import KIB, Cell, Runs, score, size, table
from tests.regen.results import ROOT, block, fine, spread

PAGE = "docs/tuning.md"


def after(number: int) -> Cell:
    """The score behind that round, of rows that clients hold out; "" where runs are shorter."""

    def cell(runs: Runs) -> str:
        curves = [run["held_out_by_round"] for run in runs]
        return spread([curve[number - 1] for curve in curves if len(curve) >= number])

    return cell


LOSSES = {"loss, nats": score("loss", fine), "forgotten, nats": score("forgetting", fine)}
TABLES: dict[str, tuple[str, dict[str, Cell]]] = {  # block -> recorded table, heading -> cell
    "labels": (
        "clinc150-labels",
        {"accuracy": score("federated", spread), "macro F1": score("macro_f1", spread)},
    ),
    "starts": (
        "shakespeare-starts",
        {
            **{f"round {number}": after(number) for number in (3, 10, 30)},
            "down, KiB a client and round": size(KIB, "down_bytes_per_client_round"),
        },
    ),
    "gsm8k": ("tuning-gsm8k", LOSSES),
}


def generate() -> dict[str, str]:
    text = (ROOT / PAGE).read_text(encoding="utf-8")
    for name, (recorded, columns) in TABLES.items():
        text = block(text, name, "\n".join(table(recorded, columns)))
    return {PAGE: text}

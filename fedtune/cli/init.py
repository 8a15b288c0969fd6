"""fedtune init: a commented recipe to begin with, for your own rows. What nobody says is guessed from the
data, or asked for at a terminal."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedtune.cli.schema import HEADER, SCHEMA
from fedtune.cli.waits import waiting
from fedtune.errors import FedtuneError
from fedtune.quiet import quiet

if TYPE_CHECKING:
    from fedtune.runtime.draft import Draft

TASKS = ("classify", "instruct", "preference", "causal-lm", "image-classify")
COMMENTS = {  # of keys of [data]
    "text": "column of the text",
    "label": "column of the class",
    "prompt": "column of the prompt",
    "response": "column of the response, which carries the loss",
    "chosen": "column of the better response: a text, or chat messages",
    "rejected": "column of the worse response",
    "messages": "column of the chat messages; loss on the assistant's turns only",
    "image": "column of the image",
}


def add_commands(commands: Any) -> None:
    parser = commands.add_parser(
        "init", help="write a commented recipe for your own data", description=__doc__
    )
    parser.add_argument(
        "data", nargs="?", default="", help="a file (CSV, JSONL, Parquet, text), a folder or a hub data set"
    )
    add_guesses(parser)
    parser.add_argument(
        "--to",
        default="",
        metavar="FILE",
        help="the recipe, which must not exist yet (default: named as the data, .toml)",
    )
    parser.set_defaults(command=run)


def add_guesses(parser: argparse.ArgumentParser) -> None:
    """What can be said instead of guessed."""
    parser.add_argument("--task", choices=TASKS, default="", help="what is learned; without it, guessed")
    parser.add_argument(
        "--model", default="", metavar="NAME", help="a folder, GGUF file or hub name; without it, a small one"
    )


def run(options: argparse.Namespace) -> int:
    from fedtune.disk import write_atomic

    data = options.data or ask("data: a file, a folder or a hub data set", "")
    if not data:
        raise FedtuneError("C103", "fedtune init without data", "a file, a folder or a hub name", "name it")
    target = Path(options.to or Path(data.rstrip("/*")).name.partition(".")[0] + ".toml").expanduser()
    if target.exists():
        raise FedtuneError("R401", f"'{target}', which already exists", "a new file", "choose another --to")
    quiet()
    from fedtune import config
    from fedtune.runtime.draft import draft

    with waiting("reading the rows"):
        made = draft(data, options.task, options.model)
    task = options.task or ask("task", made.guess.task, TASKS)
    model = options.model or ask("model", made.model if task == made.guess.task else "")
    if (task, model) != (made.guess.task, made.model):
        made = draft(data, task, model)
    text = recipe_text(made, SCHEMA if (target.parent / SCHEMA).exists() else "")
    config.parsed(text, (), target.stem)  # never a recipe that is refused
    write_atomic(target, text.encode())
    print(f"{target}: {made.guess.task} on {made.model}, {made.clients} clients, {made.rows:,} rows")
    print(f"taken from the data: {made.guess.said}")
    print("\n".join(["next:", *(f"  fedtune {one} {target}" for one in ("data", "check", "simulate"))]))
    return 0


def ask(what: str, usual: str, known: tuple[str, ...] = ()) -> str:
    """What a person at a terminal says, the usual answer where they say nothing, or where nobody is there."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return usual
    more = f" ({', '.join(known)})" if known else ""
    while True:
        said = input(f"{what}{more}{f' [{usual}]' if usual else ''}: ").strip() or usual
        if not known or said in known:
            return said


def recipe_text(draft: Draft, schema: str = "") -> str:
    """The recipe as commented TOML, with the header by which editors find its schema."""
    tree = draft.tree
    data = [
        line(key, value, COMMENTS.get(key, ""))
        for key, value in tree["data"].items()
        if key not in ("source", "path", "task", "max_length")
    ]
    if "max_length" in tree["data"]:
        longer = f"; {100 * draft.over:.1f} % of the first rows are longer, and are cut" if draft.over else ""
        data.append(line("max_length", draft.max_length, f"tokens of an example{longer}"))
    method = tree.get("method", {})
    partition = [
        line(key, value, PARTITION.get((key, value), "")) for key, value in tree["partition"].items()
    ]
    return "\n".join(
        [
            *([f"{HEADER} {schema}"] if schema else []),
            f"# A federation on {draft.rows:,} rows of {draft.path}, written by fedtune init.",
            f"# Every key: docs/recipe.md; editors complete them: fedtune schema --to {SCHEMA}",
            "seed = 1                 # every random draw follows from it: same recipe, same bytes",
            "rounds = 5",
            "",
            "[model]",
            line("name", draft.model, "a folder, a GGUF file, a hub name, or package:NAME/PATH"),
            *(line(key, value, THREADS) for key, value in tree["model"].items() if key == "threads"),
            "",
            "[data]",
            line("source", draft.source),
            line("path", draft.path, "relative to where fedtune is started"),
            line("task", draft.guess.task, f"one of {', '.join(TASKS)}"),
            *data,
            "",
            "[partition]              # how rows become clients in a simulation; real sites have their own",
            *partition,
            "",
            "[method]",
            'type = "fedpeft"         # or fedkseed, sfprompt, experts: README, "Which method to take"',
            "",
            "[method.adapter]",
            'kind = "lora"',
            "rank = 8",
            *(line(key, value, ADAPTER[key]) for key, value in method.get("adapter", {}).items()),
            "",
            "[method.train]           # of a client in each round; learning rates: docs/rates.md",
            "steps = 10",
            "batch = 8",
            *objective(method.get("train", {})),
            "",
            "[evaluate]               # beside the federation; each of the two trains the model again",
            "local = true             # every client alone",
            "centralised = true       # all rows in one place",
            "",
        ]
    )


def objective(train: dict[str, Any]) -> list[str]:
    """The loss, where the task needs one of its own."""
    if not train:
        return []
    said = train["objective"]["loss"]
    return ["", "[method.train.objective]", line("loss", said, "or ipo, orpo, simpo: docs/tuning.md")]


THREADS = "of a client; there is a process for every core"
ADAPTER = {
    "last": "so many of the last blocks are adapted; 0: all, which takes longer",
    "keep_front": "what the blocks in front of them say of a row is computed once",
}
PARTITION = {
    ("by", "iid"): "equal shares; or dirichlet, column (natural clients), shards, size",
    ("by", "column"): "each value of a column is a client; or iid, dirichlet, shards, size",
}


def line(key: str, value: Any, comment: str = "") -> str:
    said = f"{key} = {json.dumps(value, ensure_ascii=False)}"
    return f"{said:<24} # {comment}" if comment else said

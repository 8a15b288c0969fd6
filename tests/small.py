"""A federation that runs in a second: a tiny encoder, three classes of word salad, a few clients."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fedtune import config, transforms
from fedtune.config import Recipe, method_of
from fedtune.events import Event
from fedtune.rng import stream
from fedtune.runtime.checkpoints import ClientStates
from fedtune.runtime.folder import RunFolder, create
from fedtune.runtime.local import local_transport
from fedtune.runtime.protocol import Ask, Link, Transport
from fedtune.runtime.run import run
from fedtune.runtime.workspace import Workspace, build_workspace
from fedtune.types import Client

WORDS = {
    "animals": "fox cat dog runs sleeps barks",
    "music": "song piano plays slow he",
    "weather": "rain falls roof house on",
}

# [method.experts]: the clients' groups in turns, each with an expert
HALVES: dict[str, Any] = {"by": "given", "groups": ["a", "b"], "warm_up": 1, "min_clients": 2}


def rows(count: int = 120) -> list[dict[str, Any]]:
    """Labelled sentences of words that the tiny tokenizer knows; half the words say the label."""
    draw = stream("test rows", 0)
    made = []
    for number in range(count):
        label = sorted(WORDS)[number % 3]
        words = (
            draw.choice(WORDS[label].split(), 4).tolist()
            + draw.choice(["the", "a", "of", "is", "and"], 3).tolist()
        )
        made.append(
            {"text": " ".join(draw.permutation(words).tolist()), "label": label, "site": f"site-{number % 4}"}
        )
    return made


def write_rows(folder: Path, count: int = 120) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows(count)))
    return path


def tree(model: Path, data: Path, **changes: Any) -> dict[str, Any]:
    """A recipe as a tree; `changes` are dotted paths with __ for the dot."""
    base: dict[str, Any] = {
        "seed": 3,
        "rounds": 3,
        "model": {"name": str(model), "threads": 1},
        "data": {
            "source": "jsonl",
            "path": str(data),
            "task": "classify",
            "max_length": 12,
            "test_share": 0.2,
            "client_test_share": 0.1,
        },
        "partition": {"by": "iid", "clients": 4},
        "method": {
            "type": "fedpeft",
            "adapter": {"kind": "lora", "rank": 2},
            "train": {"lr": 0.01, "steps": 2, "batch": 4},
        },
        "evaluate": {"local": False, "centralised": False, "base": False},
    }
    for path, value in changes.items():
        node = base
        *parents, last = path.split("__")
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = value
    if isinstance(base["method"], dict):
        base["method"].setdefault("head_start", "random")  # most tests are about what comes after it
    return base


def recipe(model: Path, data: Path, **changes: Any) -> Recipe:
    return config.parse(tree(model, data, **changes))


def write_recipe(path: Path, model: Path, data: Path, **changes: Any) -> Path:
    """A recipe as TOML: JSON values are TOML values, except for tables, which get a header of their own."""
    made = tree(model, data, **changes)
    lines = [f"{key} = {inline(value)}" for key, value in made.items() if not isinstance(value, dict)]
    for table, values in made.items():
        if isinstance(values, dict):
            lines += [f"[{table}]", *(f"{key} = {inline(value)}" for key, value in values.items())]
    path.write_text("\n".join(lines) + "\n")
    return path


def inline(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {inline(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(inline, value)) + "]"
    return json.dumps(value)


def play(
    recipe: Recipe, root: Path, tell: Any = None, carry: Any = None
) -> tuple[RunFolder, dict[str, Any], list[Event]]:
    """Run a recipe in a new folder; its folder, result and events."""
    folder = create(root, "", "run")
    folder.write_json("config.json", recipe.model_dump(mode="json"))
    events: list[Event] = []

    def both(event: Event) -> None:
        events.append(event)
        if tell:
            tell(event)

    return folder, run(recipe, folder, both, carry), events


def workspace_of(recipe: Recipe) -> tuple[Workspace, Link]:
    """A workspace outside of any run, and a link of a run called "run"."""
    method = method_of(recipe)
    workspace = build_workspace(recipe, method, ClientStates(None), lambda event: None)
    return workspace, Link("run", workspace.base.fingerprint, method, transforms.build(recipe.chain))


def forgetful(client: int, number: int) -> Any:
    """A local transport in which one client has lost, before one round, what it held."""

    def carry(link: Link, workspace: Workspace) -> Transport:
        def asked(ask: Ask) -> Client:
            return (
                workspace.client_with(client, {})
                if (ask.client, ask.now.number) == (client, number)
                else workspace.client(ask)
            )

        return local_transport(link, asked, workspace.done)

    return carry

"""Flower's server: a cohort's questions through its grid, for `flwr run` and for the simulation engine.
Flower carries them; the rest of a run is ours."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from flwr.app import Context, Message, RecordDict

from fedtune import config
from fedtune.errors import FedtuneError
from fedtune.events import Event, Noted
from fedtune.flower.messages import HELLO, Grid, Post, pause, read_answer, write_ask
from fedtune.runtime.folder import RunFolder, create
from fedtune.runtime.protocol import Ask, Reply, Transport
from fedtune.runtime.run import run

WAIT_SECONDS = 600.0  # for nodes to connect and say who they are
ANSWER_SECONDS = 3600.0  # for one answer; after it the round goes on without that client
LATE_SECONDS = 20.0  # until it is said which nodes are waited for
IN_SIMULATION = "in Flower's own simulation, flwr run --federation-config num-supernodes=N makes N"
NODE_CONFIG = "give every SuperNode its own: --node-config 'partition-id=N'"


def flower_transport(
    grid: Grid, recipe: config.Recipe, nodes: dict[int, int], seconds: float = ANSWER_SECONDS
) -> Transport:
    """Ask members through Flower's grid. `nodes`: client id -> node id; `seconds`: how long one answer may
    take."""
    text = recipe.canonical()

    def carry(asks: Sequence[Ask]) -> Iterator[Reply]:
        post = Post(grid)
        for ask in asks:
            post.send(ask.client, write_ask(ask, text, nodes[ask.client], seconds))
        for client, answer in post.answers(seconds):
            yield read_answer(client, answer)

    return carry


def find_nodes(
    grid: Grid, wanted: int, seconds: float = WAIT_SECONDS, say: Callable[[str], None] = lambda text: None
) -> dict[int, int]:
    """Client id -> node id, once there is a node for each of `wanted` clients and every node greeted so far
    has answered. Waiting is said once.

    Raises F502 where nodes are missing after `seconds`, F503 where a node does not say which client it is or
    two say the same.
    """
    post, nodes, silent = Post(grid), dict[int, int](), set[int]()
    began, said = time.monotonic(), False
    while time.monotonic() < began + seconds:
        if not said and time.monotonic() > began + LATE_SECONDS:
            said = True
            say(f"waiting for nodes: {len(nodes)} of {wanted} clients have one ({IN_SIMULATION})")
        for node in sorted(set(grid.get_node_ids()) - nodes.keys() - silent):
            silent.add(node)
            post.send(node, Message(RecordDict({}), node, HELLO, ttl=seconds))
        for node, answer in post.pull():
            if not answer.has_error():  # an error: a node that has gone; another may come in its place
                nodes[node] = client_of(answer, nodes.values())
                silent.discard(node)
        known = {client: node for node, client in nodes.items()}
        if not post.waiting and not set(range(wanted)) - known.keys():
            return known
        pause(began)
    missing = sorted(set(range(wanted)) - set(nodes.values()))
    found = (
        f"no node for client {missing[0]} after {seconds:.0f} s ({len(nodes)} nodes answered)"
        if missing
        else f"a node that gave no answer within {seconds:.0f} s"
    )
    do = f"start the SuperNodes that are missing, or lower partition.clients; {IN_SIMULATION}; {NODE_CONFIG}"
    raise FedtuneError("F502", found, f"nodes with partition-id 0 to {wanted - 1}", do)


def client_of(answer: Message, taken: Iterable[int]) -> int:
    """The client that a node says it is. Raises F503."""
    try:
        client = int(answer.content["hello"]["client"])
    except (KeyError, TypeError, ValueError):
        client = -1
    if client < 0:
        raise FedtuneError("F503", sentence="a node does not report which client it is", do=NODE_CONFIG)
    if client in taken:
        raise FedtuneError(
            "F503", sentence=f"two nodes both report that they are client {client}", do=NODE_CONFIG
        )
    return client


def serve(
    grid: Grid,
    recipe: config.Recipe,
    folder: RunFolder,
    tell: Callable[[Event], None],
    wait: float = WAIT_SECONDS,
) -> dict[str, Any]:
    """A whole run with Flower's nodes as clients; the journal and the bytes are those of a local run."""

    def say(text: str) -> None:
        tell(Noted(text))

    return run(
        recipe,
        folder,
        tell,
        lambda link, workspace: flower_transport(
            grid, recipe, find_nodes(grid, len(workspace.names), wait, say)
        ),
    )


def serve_context(
    grid: Grid,
    context: Context,
    app_folder: Path,
    sinks: Callable[[RunFolder, config.Recipe], Callable[[Event], None]],
) -> None:
    """`flwr run`: recipe, overrides and runs folder from the run config; relative paths count from the
    SuperLink's folder, a recipe's also from the app's."""
    options = {key: str(context.run_config.get(key, "")) for key in ("recipe", "set", "runs")}
    path = options["recipe"]
    if path and not Path(path).exists() and (app_folder / path).exists():
        path = str(app_folder / path)
    recipe = config.decided(config.read(path or None, options["set"].split()))
    folder = create(Path(options["runs"] or "runs"), recipe.name, Path(path).stem if path else "demo")
    folder.begin(recipe)
    serve(grid, recipe, folder, sinks(folder, recipe))

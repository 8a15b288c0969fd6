"""Flower's client: a node that says which client it is, and answers what it is asked. For `flwr run` and for
the simulation engine."""

from __future__ import annotations

import os
from pathlib import Path

from flwr.app import ConfigRecord, Context, Message, RecordDict
from safetensors.numpy import load, save

from fedtune import config
from fedtune.flower.messages import read_ask, write_answer
from fedtune.panics import panics_as_errors
from fedtune.runtime.checkpoints import ClientStates
from fedtune.runtime.client_half import Versions, respond, state_after, state_before
from fedtune.runtime.client_store import FolderVault, load_versions, save_versions
from fedtune.runtime.failures import failure_of
from fedtune.runtime.protocol import Link, Reply
from fedtune.runtime.workspace import Workspace, build_workspace, link_of


def hello(message: Message, context: Context) -> Message:
    """Which client this node is: its `partition-id`, or -1 where it has none."""
    return Message(
        RecordDict({"hello": ConfigRecord({"client": int(context.node_config.get("partition-id", -1))})}),
        reply_to=message,
    )


def answer(
    message: Message, context: Context, shelf: Path | None = None, place: Path | None = None
) -> Message:
    """Do what is asked; a mistake travels back as its code and sentence, never as a traceback.

    The client's state lies on `shelf`, or in the folder that the node's config calls `memory`, and then
    outlives the SuperNode; otherwise in Flower's per-node state, which is RAM. The server never says where:
    it has no say over a site's disk.

    place  where the recipe's relative paths are meant from; None: from the working directory
    """
    keeps, number, name = shelf, -1, "?"
    try:
        with panics_as_errors():
            ask = read_ask(message)
            workspace, link = workspaces(str(message.content["ask"]["recipe"]), place)
            number, name = ask.client, workspace.names.get(ask.client, str(ask.client))
            keeps = shelf or (
                Path(str(context.node_config["memory"])) / link.run
                if "memory" in context.node_config
                else None
            )
            versions = load_client_states(context, keeps, ask.client)
            client = workspace.client_with(ask.client, state_before(versions, ask))
            client.vault = FolderVault(keeps / "vault" / str(ask.client)) if keeps else ContextVault(context)
            reply = respond(link, client, ask)
            save_client_states(context, keeps, ask.client, state_after(versions, ask, client.state))
    except Exception as cause:  # whatever it is, it is about this client
        reply = Reply(number, failure=failure_of(cause, name, keeps / "errors" if keeps else None))
    return write_answer(reply, message)


_worlds: dict[
    str, tuple[Workspace, Link]
] = {}  # this process's model and data, by recipe: an actor answers for many clients


def workspaces(recipe_json: str, place: Path | None = None) -> tuple[Workspace, Link]:
    """Build the workspace of a recipe once a process; `place`: where its relative paths are meant from."""
    if recipe_json not in _worlds:
        recipe = config.Recipe.model_validate_json(recipe_json)
        method = config.method_of(recipe)
        own = on_own_gpu(recipe)
        workspace = build_workspace(own, method, ClientStates(None), lambda event: None, place=place)
        _worlds.clear()  # one recipe at a time: two models may not fit
        _worlds[recipe_json] = workspace, link_of(workspace, method, agreed=recipe)
    return _worlds[recipe_json]


def on_own_gpu(recipe: config.Recipe) -> config.Recipe:
    """A recipe as an actor of Ray's can follow it, which sees no GPU but the one that it was given: whatever
    its number in the machine, it has number 0 here."""
    from fedtune.model.hardware import gpu_count

    numbered = recipe.model.device.startswith("cuda:")
    if not numbered or "CUDA_VISIBLE_DEVICES" not in os.environ or gpu_count() != 1:
        return recipe
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"device": "cuda"})})


def load_client_states(context: Context, place: Path | None, client: int) -> Versions:
    """The client's states, by round."""
    if place:
        return load_versions(place, client)
    return {
        int(number): dict(load(bytes(tensors))) for number, tensors in context.state.get("memory", {}).items()
    }


class ContextVault:
    """Secrets of a round's masked sums in Flower's per-node state: an actor of the simulation engine answers
    for many clients, and not always for the same."""

    def __init__(self, context: Context) -> None:
        self.context = context

    def _held(self) -> dict[str, bytes]:
        return {name: bytes(secret) for name, secret in self.context.state.get("vault", {}).items()}

    def read(self, name: str) -> bytes | None:
        return self._held().get(name)

    def write(self, name: str, secret: bytes) -> None:
        self.context.state["vault"] = ConfigRecord(self._held() | {name: secret})

    def names(self) -> list[str]:
        return sorted(self._held())

    def remove(self, name: str) -> None:
        self.context.state["vault"] = ConfigRecord({k: v for k, v in self._held().items() if k != name})


def save_client_states(context: Context, place: Path | None, client: int, versions: Versions) -> None:
    """Keep these states of the client and no others; on disk, each file is whole or absent."""
    if place:
        save_versions(place, client, versions)
    else:
        context.state["memory"] = ConfigRecord(
            {str(number): save(tensors) for number, tensors in versions.items()}
        )

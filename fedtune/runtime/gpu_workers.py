"""The local transport over several GPUs: a process for each, which loads the recipe's model and data anew and
answers for clients as a fork of this one would (runtime/workers.py). A fork cannot use CUDA, so these are
begun as programs of their own.

Which process answers for a client changes nothing on GPUs of one kind, as far as two passes on one of them
are the same (`model.deterministic`)."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from multiprocessing.connection import Connection
from pathlib import Path

from fedtune.config import Recipe, method_of
from fedtune.errors import FedtuneError
from fedtune.forks import die_with_parent
from fedtune.methods import Method
from fedtune.runtime.checkpoints import ClientStates
from fedtune.runtime.paths import located
from fedtune.runtime.protocol import Link
from fedtune.runtime.workers import Worker, Workers, answer_one, bound_here, end
from fedtune.runtime.workspace import Workspace, build_workspace, link_of

BEGIN = "from sys import argv; from fedtune.runtime.gpu_workers import serve; serve(int(argv[1]))"


def gpus_for(
    recipe: Recipe, workspace: Workspace, method: Method, own_rows: bool, asked: int = 0
) -> tuple[list[str], str]:
    """The devices that answer for clients, a process each, and why they are not as many as there are: none
    where this process works for all of them.

    own_rows  whether the rows are those that the recipe names, which another process can read
    asked     how many at most; 0: as many as there are
    """
    from fedtune.model.hardware import gpu_count

    there = gpu_count() if workspace.base.device.type == "cuda" else 0
    if there < 2 or asked == 1:
        return [], ""
    why = bound_here(recipe, method)
    if recipe.model.device not in ("auto", "cuda"):
        why = f"model.device = '{recipe.model.device}' names one of {there} GPUs"
    elif not own_rows:
        why = "the rows are in this process alone"
    count = 1 if why else min(asked or there, there, len(workspace.names))
    return ([f"cuda:{number}" for number in range(count)] if count > 1 else []), why


def on_gpus(link: Link, workspace: Workspace, logs: Path, devices: list[str], place: Path | None) -> Workers:
    """A transport with a process on each of the devices.

    place  where the recipe's relative paths are meant from; None: from the working directory
    """
    about = {"recipe": workspace.recipe.canonical(), "logs": str(logs), "place": str(place or "")}
    return Workers(link, workspace, logs, len(devices), lambda: begun(devices, about, link.base))


def begun(devices: list[str], about: dict[str, str], base: str) -> list[Worker]:
    """A process on each device, all at once. Raises R406 where one has another base than `base`, R411 where
    one has ended, after it has said why."""
    workers = [spawn(about | {"device": device}) for device in devices]
    for worker, device in zip(workers, devices, strict=True):
        try:
            found = worker.pipe.recv_bytes().decode()
        except (EOFError, OSError):
            found = ""
        if found != base:
            for one in workers:
                end(one)
            raise unlike(found, base, device)
    return workers


def spawn(about: dict[str, str]) -> Worker:
    ours, theirs = socket.socketpair()
    with theirs:
        handle = theirs.fileno()
        child = subprocess.Popen([sys.executable, "-c", BEGIN, str(handle)], pass_fds=[handle])
    child.returncode = 0  # it is `end` that waits for it
    pipe = Connection(ours.detach())
    pipe.send_bytes(json.dumps(about).encode())
    return Worker(child.pid, pipe)


def unlike(base: str, wanted: str, device: str) -> FedtuneError:
    if not base:
        sentence = f"the process that was to work on {device} ended before it could answer"
        return FedtuneError("R411", sentence=sentence, do="see what it said above, or use --workers 1")
    found = f"base model {base[:12]} in the process that works on {device}"
    return FedtuneError("R406", found, wanted[:12], "start again when the model's files have come to rest")


def serve(handle: int) -> None:
    """A worker's life. It ends without clean-up, as a fork does, after its base is said and questions are
    over."""
    die_with_parent()
    pipe = Connection(handle)
    about = json.loads(pipe.recv_bytes())
    recipe, place = (
        Recipe.model_validate_json(about["recipe"]),
        Path(about["place"]) if about["place"] else None,
    )
    model = recipe.model.model_copy(update={"device": about["device"]})
    method = method_of(located(recipe, place))
    own = recipe.model_copy(update={"model": model})
    run = Path(about["logs"]).parent
    workspace = build_workspace(own, method, ClientStates(None), lambda event: None, place=place, folder=run)
    link = link_of(workspace, method, agreed=recipe)
    try:
        pipe.send_bytes(link.base.encode())
        while True:
            answer_one(pipe, link, workspace, Path(about["logs"]))
    except (EOFError, OSError):
        os._exit(0)  # the run is over

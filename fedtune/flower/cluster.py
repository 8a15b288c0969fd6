"""A Ray cluster that somebody else started, under Flower's simulation engine: joined, asked beforehand
whether its nodes hold what clients need, and left as it was."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from fedtune.config import Recipe
from fedtune.errors import FedtuneError
from fedtune.events import Event, Noted
from fedtune.versions import versions

Facts = Mapping[str, Any]  # what one node says of itself: versions, error, data, base, folder


def address_of(asked: str) -> str:
    """Of the cluster to use: what the user asked for, else RAY_ADDRESS, else "": a Ray of our own."""
    found = asked or os.environ.get("RAY_ADDRESS", "")
    return "" if found == "local" else found


@contextlib.contextmanager
def begun(ray: Any, failed: str, do: str, **options: Any) -> Iterator[None]:
    """Ray, initialised with these options, until the block ends. Raises F504: `failed`, the reason, `do`."""
    debug = bool(os.environ.get("FEDTUNE_DEBUG"))
    level = logging.INFO if debug else logging.CRITICAL
    try:
        ray.init(log_to_driver=debug, logging_level=level, **options)
    except Exception as error:  # Ray raises what comes up: OSError, RuntimeError, ConnectionError, its own
        raise FedtuneError("F504", sentence=f"{failed} ({root(error)})", do=do) from error
    try:
        yield
    finally:
        ray.shutdown()


def connected(ray: Any, address: str) -> AbstractContextManager[None]:
    """Connected to the cluster at an address (host:port, or auto). Raises F504.

    Its token is the user's own, in RAY_AUTH_TOKEN or Ray's token file: none is made up here.
    """
    do = (
        "look at `ray status` there, and at RAY_AUTH_MODE and RAY_AUTH_TOKEN; or leave out --ray and "
        "RAY_ADDRESS for a Ray of this machine"
    )
    return begun(ray, f"no Ray cluster answers at {address}", do, address=address)


def root(*errors: BaseException) -> str:
    """The first line of what an error began with."""
    for error in errors:
        return (
            root(error.__cause__)
            if error.__cause__
            else (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        )
    return "no reason given"


def actor_size(threads: int, device: str) -> dict[str, float]:
    """What one Ray actor takes. An actor computes with as many threads as the local engine would, because
    bits may depend on them, and so takes as many CPUs. Where the work is on a GPU, one actor has it to
    itself."""
    if device == "cuda":
        return {"num_cpus": 1, "num_gpus": 1}
    return {"num_cpus": threads, "num_gpus": 0}


def cluster_size(ray: Any, threads: int, device: str) -> dict[str, float]:
    """The same of a cluster: a GPU where it has any and the recipe does not forbid it."""
    wanted = device == "auto" or device.startswith("cuda")
    return actor_size(threads, "cuda" if wanted and ray.cluster_resources().get("GPU", 0) else "cpu")


def look(recipe: str, place: str, mark: str) -> dict[str, Any]:
    """On a node: what a client's actor would find there. Nothing that goes wrong is raised."""
    from fedtune.flower.client_app import workspaces

    facts: dict[str, Any] = {"versions": dict(versions()), "folder": Path(mark).is_file()}
    try:
        workspace, link = workspaces(recipe, Path(place))
    except Exception as error:
        return facts | {"error": str(error) or type(error).__name__}
    return facts | {"data": workspace.federation.fingerprint, "base": link.base}


def ask_nodes(ray: Any, recipe: Recipe, place: Path, mark: Path) -> dict[str, dict[str, Any]]:
    """`look` on every node of the cluster that can hold clients, by address."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    asked: dict[str, Any] = {}
    for node in ray.nodes():
        if node["Alive"] and node["Resources"].get("CPU", 0):
            there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            looking = ray.remote(num_cpus=1, max_calls=1, max_retries=0, scheduling_strategy=there)(look)
            name = f"{node['NodeManagerAddress']} ({node['NodeID'][:8]})"
            asked[name] = looking.remote(recipe.canonical(), str(place), str(mark))
    return {name: answer_of(ray, reference) for name, reference in asked.items()}


def answer_of(ray: Any, reference: Any) -> dict[str, Any]:
    """What a node said; where it could not even begin, why."""
    try:
        return dict(ray.get(reference))
    except Exception as error:  # fedtune is not installed there, the node has gone, its memory ended
        cause = getattr(error, "cause", None) or error
        return {
            "error": f"fedtune could not be started there: {(str(cause).splitlines() or ['?'])[-1][:200]}"
        }


def require_alike(found: Mapping[str, Facts], here: Facts) -> None:
    """Raises F504 for the first node on which a client would not do what it does here, with the reason."""
    for name, facts in found.items():
        if "error" in facts:
            sentence, do = (
                facts["error"],
                "give every node the same paths (a shared file system) and packages",
            )
        elif facts["versions"] != here["versions"]:
            names = [key for key, value in here["versions"].items() if facts["versions"].get(key) != value]
            said = ", ".join(
                f"{key} {facts['versions'].get(key)} for {here['versions'][key]}" for key in names
            )
            sentence, do = f"it has {said}", "install the same versions on every node"
        elif facts["data"] != here["data"]:
            sentence, do = "it reads other rows than this machine", "put the same data under the same path"
        elif facts["base"] != here["base"]:
            sentence, do = "it loads another base model", "put the same model under the same path"
        else:
            continue
        raise FedtuneError("F504", sentence=f"node {name} of the Ray cluster cannot serve: {sentence}", do=do)


def prepare(
    ray: Any, recipe: Recipe, data: str, base: str, folder: Path, tell: Callable[[Event], None]
) -> Path | None:
    """Ask all nodes whether they hold what clients need, and say what was found. Raises F504.

    data, base  fingerprints of this machine's rows and base model
    folder      the run's; returned where every node sees it: what clients keep between rounds lies there and
                outlives the engine. None: it travels with Flower's messages, and ends with this process
    """
    tell(Noted("asking the nodes of the Ray cluster for model and data"))
    found = ask_nodes(ray, recipe, Path.cwd(), folder / "config.json")
    if not found:
        raise FedtuneError(
            "F504",
            sentence="the Ray cluster has no node with a CPU",
            do="add nodes with `ray start --address ...`",
        )
    require_alike(found, {"versions": dict(versions()), "data": data, "base": base})
    shared = all(facts["folder"] for facts in found.values())
    kept = "the run's folder" if shared else "this process, since not every node sees the run's folder"
    tell(
        Noted(
            f"nodes of the Ray cluster: {len(found)}, all with this model and data; "
            f"clients' states are in {kept}"
        )
    )
    return folder if shared else None

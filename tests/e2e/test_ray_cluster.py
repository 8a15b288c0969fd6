"""Flower's simulation engine on a Ray cluster that is there already: two nodes as two raylets of this machine,
with a token of their own."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fedtune.errors import FedtuneError
from fedtune.flower import cluster
from tests import small

# looked for and not imported: Ray reads its settings when it is, and other tests of this process have their own
pytestmark = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed")

NODES = """
import sys
from ray.cluster_utils import Cluster
made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
made.add_node(num_cpus=1)
print(made.address, flush=True)
sys.stdin.read()
made.shutdown()
"""
ALIKE = {"versions": {"torch": "2"}, "data": "d", "base": "b", "folder": True}


@pytest.fixture
def nodes() -> Iterator[dict[str, str]]:
    """The environment of a user of a cluster of two nodes with one CPU each; RAY_ADDRESS says where it is."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    env |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_worker_niceness": "0"}
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", NODES], env=env, **pipes) as process:
        assert process.stdin and process.stdout
        try:
            yield env | {"RAY_ADDRESS": process.stdout.readline().strip()}
        finally:
            process.stdin.close()
            process.wait(60)


def simulate(recipe: Path, cwd: Path, env: dict[str, str], *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fedtune", "simulate", recipe.name, "--runs", "runs", *more]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_a_cluster_of_two_nodes_ends_with_the_bytes_of_a_local_run_and_is_left_alone(
    tiny_bert: Path, tmp_path: Path, nodes: dict[str, str]
) -> None:
    """The recipe names its data by a path that is relative to where the user stands, not to where Ray was
    started, and clients remember what they did not get to say."""
    small.write_rows(tmp_path)
    memory = {"chain": [{"step": "sign", "error_feedback": True}]}
    recipe = small.write_recipe(tmp_path / "small.toml", tiny_bert, Path("rows.jsonl"), **memory)
    for count in (1, 2):  # the first run does not take the cluster down
        done = simulate(recipe, tmp_path, nodes, "--engine", "flower")
        assert not done.returncode, done.stderr
        assert "nodes of the Ray cluster: 2, all with this model and data" in done.stdout
        assert count == len(list((tmp_path / "runs").glob("small*")))
    here = simulate(recipe, tmp_path, os.environ | {"RAY_ADDRESS": ""})
    assert not here.returncode, here.stderr
    results = [json.loads(path.read_text()) for path in sorted((tmp_path / "runs").glob("*/result.json"))]
    assert len(results) == 3 and len({result["state_sha256"] for result in results}) == 1


@pytest.mark.slow
def test_without_the_clusters_token_nothing_is_told(
    tiny_bert: Path, data: Path, tmp_path: Path, nodes: dict[str, str]
) -> None:
    recipe = small.write_recipe(tmp_path / "small.toml", tiny_bert, data)
    done = simulate(recipe, tmp_path, nodes | {"RAY_AUTH_TOKEN": secrets.token_hex(32)}, "--engine", "flower")
    assert done.returncode and "F504" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({"error": "D201: no file at /data/rows.jsonl"}, "no file at /data/rows.jsonl"),
        ({"versions": {"torch": "1"}}, "it has torch 1 for 2"),
        ({"data": "other"}, "other rows"),
        ({"base": "other"}, "another base model"),
    ],
)
def test_a_node_that_cannot_serve_is_named_with_the_reason(facts: dict[str, Any], said: str) -> None:
    cluster.require_alike({"10.0.0.1": ALIKE, "10.0.0.2": ALIKE}, ALIKE)
    with pytest.raises(FedtuneError, match=rf"F504: node 10\.0\.0\.2 .*{said}"):
        cluster.require_alike({"10.0.0.1": ALIKE, "10.0.0.2": ALIKE | facts}, ALIKE)


@pytest.mark.parametrize(
    ("gpus", "device", "size"),
    [
        (0, "auto", {"num_cpus": 2, "num_gpus": 0}),
        (8, "auto", {"num_cpus": 1, "num_gpus": 1}),
        (8, "cuda:0", {"num_cpus": 1, "num_gpus": 1}),
        (8, "cpu", {"num_cpus": 2, "num_gpus": 0}),
    ],
)
def test_an_actor_takes_a_gpu_where_there_are_any(gpus: int, device: str, size: dict[str, int]) -> None:
    ray = SimpleNamespace(cluster_resources=lambda: {"CPU": 16.0, "GPU": float(gpus)})
    assert cluster.cluster_size(ray, 2, device) == size


def test_where_the_cluster_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    assert cluster.address_of("") == "head:6379" and cluster.address_of("10.0.0.1:6379") == "10.0.0.1:6379"
    monkeypatch.setenv("RAY_ADDRESS", "local")
    assert cluster.address_of("") == ""


def test_a_cluster_is_for_flowers_engine(tiny_bert: Path, data: Path, tmp_path: Path) -> None:
    import fedtune

    with pytest.raises(FedtuneError, match="C104"):
        fedtune.simulate(small.tree(tiny_bert, data), runs=tmp_path, ray="auto")


def test_where_nobody_answers_it_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**named: Any) -> None:
        raise ConnectionError("Could not find any running Ray instance at 10.0.0.1:1")

    ray: Any = SimpleNamespace(init=refuse)
    said = pytest.raises(FedtuneError, match=r"F504: no Ray cluster answers at 10\.0\.0\.1:1")
    with said, cluster.connected(ray, "10.0.0.1:1"):
        raise AssertionError

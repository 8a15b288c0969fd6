"""The base install is what a local run of an adapter needs; what needs more says so in a sentence.

Nothing is installed here: packages that the base does not bring, by the metadata of what is installed, are hidden.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests import small
from tests.brought import CORE, brought, called, size_of

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
HIDE = """import json, sys
sys.modules.update(dict.fromkeys({!r}))
from fedtune.cli import main
print(json.dumps([main(json.loads(words)) for words in sys.argv[1:]]))"""  # commands that end one after the other


@pytest.fixture(scope="module")
def hidden() -> list[str]:
    """Modules that a base install does not have."""
    base = brought(PROJECT["dependencies"])
    return sorted(
        module
        for module, packages in packages_distributions().items()
        if module.isidentifier()
        and module != "fedtune"
        and not base & set(map(called, packages))
        and "fedtune" not in packages
        and not (ROOT / module).exists()  # tests, client, server: of this folder
    )


def fedtune(hidden: list[str], place: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", HIDE.format(hidden), *words],
        cwd=place,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_base_is_small(hidden: list[str]) -> None:
    """As promised: at most 20 packages and 200 MB over torch, transformers and peft."""
    assert {"flwr", "ray", "datasets", "numba", "pyarrow", "pandas", "optuna", "gguf"} <= set(hidden)
    more = brought(PROJECT["dependencies"]) - brought(CORE)
    assert len(more) <= 20 and size_of(more) < 200e6, sorted(more)


@pytest.mark.thorough
def test_a_local_run_needs_the_base_only(hidden: list[str], tiny_bert: Path, tmp_path: Path) -> None:
    recipe = small.write_recipe(tmp_path / "r.toml", tiny_bert, small.write_rows(tmp_path), rounds=1)
    words = (
        ["check", "r.toml"],
        ["simulate", "r.toml"],
        ["predict", "runs/r", "rows.jsonl", "--to", "p.csv"],
    )
    done = fedtune(hidden, tmp_path, *map(json.dumps, words))
    assert done.stdout.endswith("\n[0, 0, 0]\n"), done.stderr
    assert (tmp_path / "runs" / "r" / "adapter" / "adapter_model.safetensors").exists() and recipe.exists()


MORE = [
    (["simulate", "r.toml", "--engine", "flower"], "F501", "flower"),
    (["server", "r.toml"], "F501", "flower"),
    (["client", "--server", "localhost:1", "--keys", "keys"], "F501", "flower"),
    (["simulate", "r.toml", "--set", "method.type=fedkseed"], "C107", "zeroth"),
    (["simulate", "r.toml", "--set", "data.source=hub"], "D208", "hub"),
    (["simulate", "r.toml", "--set", "data.source=parquet"], "D208", "parquet"),
    (["sweep", "r.toml", "--trials", "2", "--sample", "rounds=1..2"], "C107", "sweep"),
]


@pytest.mark.thorough
def test_what_needs_more_says_which_command_installs_it(
    hidden: list[str], tiny_bert: Path, tmp_path: Path
) -> None:
    small.write_recipe(tmp_path / "r.toml", tiny_bert, small.write_rows(tmp_path), rounds=1)
    done = fedtune(hidden, tmp_path, *(json.dumps(words) for words, _, _ in MORE))
    said = done.stderr.splitlines()
    assert json.loads(done.stdout.splitlines()[-1]) == [2] * len(MORE) == [2] * len(said), done.stderr
    for line, (_, code, extra) in zip(said, MORE, strict=True):
        assert line.startswith(f"fedtune: {code}: ") and f"pip install 'fedtune[{extra}]'" in line


def test_every_extra_that_a_sentence_names_is_there() -> None:
    named = set()
    for path in (ROOT / "fedtune").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            asks = isinstance(node, ast.Call) and ast.unparse(node.func) in ("require", "missing")
            if asks and len(node.args) >= 3 and isinstance(node.args[1], ast.Constant):
                named.add(node.args[1].value)
    assert {"flower", "zeroth", "hub", "gguf"} <= named <= PROJECT["optional-dependencies"].keys()


def test_the_tests_have_all_extras() -> None:
    """A clean clone runs everything with the README's first command."""
    extras = PROJECT["optional-dependencies"]
    (own,) = (line for line in extras["test"] if line.startswith("fedtune["))
    assert Requirement(own).extras >= {"flower", "zeroth", "hub", "parquet", "sweep", "trackers"}
    whole = {called(Requirement(line).name) for name in Requirement(own).extras for line in extras[name]}
    for name in ("metrics", "gguf"):
        assert {called(Requirement(line).name) for line in extras[name]} <= whole

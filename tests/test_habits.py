"""What the pages say about the repository's habits is what its programs do."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]


def test_the_hooks_before_a_commit_are_the_static_checks_of_ci() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    checks = re.search(r"^step 'ruff, .*?'\n(.*?)\n\n", script, re.M | re.S)
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    assert checks and [hook["entry"] for hook in hooks[0]["hooks"]] == checks[1].splitlines()
    assert [repo["repo"] for repo in hooks] == ["local"]  # works without a network
    assert all(hook["language"] == "system" and not hook["pass_filenames"] for hook in hooks[0]["hooks"])


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "SECURITY.md", "README.md"])
def test_paths_that_a_page_names_are_there(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    code = re.findall(
        r"`((?:fedtune|tests|docs|benchmarks|simulations|protos|server|client|docker)/[\w./-]*)`", text
    )
    named = code + re.findall(r"\]\(([\w./-]+)[)#]", text)
    gone = [name for name in named if not (ROOT / name).exists()]
    assert len(named) > 2 and not gone


def test_what_is_cited_is_this_version() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert cited["version"] == project["version"] and "Apache License" in (ROOT / "LICENSE").read_text()
    assert cited["license"] == "Apache-2.0" and cited["cff-version"] == "1.2.0"


def test_type_checkers_see_the_annotations() -> None:
    assert (ROOT / "fedtune" / "py.typed").exists()


def test_no_file_of_the_library_is_long() -> None:
    """At 400 lines a file is split by subject."""
    long = [
        f"{path.relative_to(ROOT)}: {lines} lines"
        for path in sorted((ROOT / "fedtune").rglob("*.py"))
        if "_pb2" not in path.name and (lines := len(path.read_text(encoding="utf-8").splitlines())) > 400
    ]
    assert long == []


def test_no_library_code_changes_the_working_directory() -> None:
    """It belongs to the whole process, and several runs may be in it."""
    files = sorted((ROOT / "fedtune").rglob("*.py"))
    assert len(files) > 200 and not [file for file in files if "chdir(" in file.read_text(encoding="utf-8")]


def test_nobody_reaches_into_a_method_by_name() -> None:
    """What the runtime may ask of a method stands in its interface: no attribute by its name, no class and no
    type string elsewhere."""
    types = {"fedpeft", "fedkseed", "sfprompt", "offsite", "ltsft"}
    found = []
    for path in sorted((ROOT / "fedtune").rglob("*.py")):
        if path.parent.name == "methods":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            asks = (
                isinstance(node, ast.Call)
                and ast.unparse(node.func) in ("getattr", "hasattr", "isinstance")
                and "method" in ast.unparse(node.args[0])
            )
            named = isinstance(node, ast.Compare) and any(
                isinstance(n, ast.Constant) and n.value in types for n in ast.walk(node)
            )
            imported = isinstance(node, ast.ImportFrom) and re.fullmatch(
                r"fedtune\.methods\.(fedpeft|fedkseed|sfprompt|offsite|ltsft)\w*", node.module or ""
            )
            if asks or named or imported:
                found.append(f"{path.relative_to(ROOT)}:{node.lineno} {ast.unparse(node)}")
    assert found == []

"""What the pages say about the repository's habits is what its programs do."""

from __future__ import annotations

import re
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
    code = re.findall(r"`((?:fedtune|tests|docs|benchmarks|simulations|protos|server|client|docker)/[\w./-]*)`", text)
    named = code + re.findall(r"\]\(([\w./-]+)[)#]", text)
    gone = [name for name in named if not (ROOT / name).exists()]
    assert len(named) > 2 and not gone


def test_type_checkers_see_the_annotations() -> None:
    assert (ROOT / "fedtune" / "py.typed").exists()


def test_no_library_code_changes_the_working_directory() -> None:
    """It belongs to the whole process, and several runs may be in it."""
    files = sorted((ROOT / "fedtune").rglob("*.py"))
    assert len(files) > 200 and not [file for file in files if "chdir(" in file.read_text(encoding="utf-8")]

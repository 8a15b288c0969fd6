"""Mutation tests: faults put into a room of the library, one at a time, and how many of them the room's own tests see.

    python -m tests.mutation wire trust                  # every mutant
    python -m tests.mutation runtime --sample 200        # 200 drawn at random, with a confidence interval

mutmut makes the mutants and runs, for each, the tests that call the mutated function. What survives is tried again with
all tests of the files in which those tests stand, because what a shared fixture calls is counted for one test only.
What is said to people is left alone: a mutant that only changes the words of a sentence, or what an error says beside its
code, is drawn for no sample and counted nowhere.
"""

from __future__ import annotations

import argparse
import ast
import copy
import difflib
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROOMS = ("runtime", "wire", "exchange", "trust", "deploy", "model")
LEFT_OUT = {
    "wire": ["tests/wire/test_hostile.py::test_fifty_thousand_mutations"],  # minutes for each survivor
    "deploy": ["tests/deploy/test_script_program.py"],  # a script is given no word of which mutant is meant
}
KILLED = {1, 3, 24, -24, 36, 152, 255, -6, -9, -11}  # a failed test, a crash, an endless loop (mutmut.stats)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.mutation", description=__doc__)
    parser.add_argument("rooms", nargs="*", metavar="ROOM", default=ROOMS, help="one of " + ", ".join(ROOMS))
    parser.add_argument("--sample", type=int, metavar="N", help="N mutants drawn at random instead of all")
    parser.add_argument("--seed", type=int, default=1, help="of the draw")
    parser.add_argument("--folder", type=Path, default=ROOT / ".mutation", help="where the mutants are kept")
    arguments = parser.parse_args()
    for room in arguments.rooms:
        print(measured(room, arguments.folder / room, arguments.sample, arguments.seed), flush=True)


def measured(room: str, folder: Path, sample: int | None, seed: int) -> str:
    """Runs a room's mutants; the score in a line, and survivors with their differences in survivors.txt."""
    prepare(room, folder)
    generate(folder)
    named = names(folder)
    drawn = draw(named, folder, sample, seed)
    mutmut(folder, drawn)
    if first := alive(folder, drawn):
        widen(folder)
        mutmut(folder, list(first))
    survivors = alive(folder, drawn)
    diffs = [f"{code} {name}\n{difference(folder, name)}\n" for name, code in survivors.items()]
    (folder / "survivors.txt").write_text("\n".join(diffs), encoding="utf-8")
    killed, total = len(drawn) - len(survivors), len(drawn)
    low, high = interval(killed, total)
    of = f"a sample of {len(named)}, 95 % interval {low:.1%} to {high:.1%}" if sample else "all"
    return f"{room}: {killed} of {total} killed, {killed / total:.1%} ({of}); survivors in {folder}/survivors.txt"


def prepare(room: str, folder: Path) -> None:
    """A copy of the tree whose configuration names the room."""
    shutil.rmtree(folder, ignore_errors=True)
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    settings = folder / "pyproject.toml"
    chosen = [f"tests/{room}", *(f"--deselect={test}" for test in LEFT_OUT.get(room, ()))]
    added = (
        f'[tool.mutmut]\nonly_mutate = ["fedtune/{room}/*"]\n'
        f"pytest_add_cli_args_test_selection = {json.dumps(chosen)}\n"
    )
    text = settings.read_text(encoding="utf-8")
    settings.write_text(text.replace("[tool.mutmut]", added.rstrip(), 1), encoding="utf-8")


def environment(folder: Path) -> dict[str, str]:
    """Other processes that a test starts import the mutated library, too."""
    return {**os.environ, "PYTHONPATH": str(folder / "mutants"), "PYTHONHASHSEED": "0"}


def generate(folder: Path) -> None:
    """What `mutmut run` does first."""
    steps = (
        "import os; os.makedirs('mutants', exist_ok=True); import mutmut.__main__ as m; "
        "m.copy_src_dir(); m.copy_also_copy_files(); m.create_mutants(1)"
    )
    subprocess.run([sys.executable, "-c", steps], cwd=folder, check=True, stdout=subprocess.DEVNULL)


def mutmut(folder: Path, chosen: list[str]) -> None:
    command = [str(Path(sys.executable).with_name("mutmut")), "run", "--max-children", "1", *chosen]
    with (folder / "mutmut.log").open("a", encoding="utf-8") as log:
        subprocess.run(command, cwd=folder, env=environment(folder), check=True, stdout=log, stderr=log)


def codes(folder: Path) -> dict[str, int | None]:
    """Every mutant's exit code, by its name; None where it did not run."""
    found: dict[str, int | None] = {}
    for path in sorted((folder / "mutants" / "fedtune").rglob("*.meta")):
        found |= json.loads(path.read_text(encoding="utf-8"))["exit_code_by_key"]
    return found


def alive(folder: Path, drawn: list[str]) -> dict[str, int | None]:
    """Those that no test noticed, and their exit codes."""
    found = codes(folder)
    return {name: found[name] for name in drawn if found[name] not in KILLED}


def names(folder: Path) -> list[str]:
    return sorted(codes(folder))


def draw(named: list[str], folder: Path, sample: int | None, seed: int) -> list[str]:
    """All mutants but those of sentences, or a sample of them."""
    order = random.Random(seed).sample(named, len(named))
    drawn: list[str] = []
    for name in order:
        if sample is not None and len(drawn) == sample:
            break
        if not only_words(folder, name):
            drawn.append(name)
    return drawn


def difference(folder: Path, name: str) -> str:
    """The mutant's lines as a diff."""
    before, after = (ast.unparse(node).splitlines()[1:] for node in pair(folder, name))
    return "\n".join(
        line
        for line in difflib.unified_diff(before, after, n=0, lineterm="")
        if line[:2] not in ("--", "++", "@@")
    )


def only_words(folder: Path, name: str) -> bool:
    """Whether a mutant changes nothing but what a text or an error says to a person."""
    before, after = (
        ast.dump(ast.Module(WithoutWords().visit(copy.deepcopy(node)).body, []))
        for node in pair(folder, name)
    )
    return before == after


class WithoutWords(ast.NodeTransformer):
    """Texts with a space are emptied; of an error, its class and its code remain."""

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        sentence = isinstance(node.value, str) and " " in node.value.strip()
        return ast.Constant("") if sentence else node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        first = node.args[0] if node.args else None
        if isinstance(first, ast.Constant) and re.fullmatch(r"[A-Z]\d{3}", str(first.value)):
            return ast.Call(node.func, [first], [])
        return self.generic_visit(node)


@cache
def functions(path: Path) -> dict[str, ast.FunctionDef]:
    """The originals and mutants that mutmut wrote into a file, by their names."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {
        node.name: node
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and "__mutmut_" in node.name
    }


def pair(folder: Path, name: str) -> tuple[ast.FunctionDef, ast.FunctionDef]:
    """A function as it is, and the mutant of it."""
    module, _, mutant = name.rpartition(".")
    path = folder / "mutants" / (module.replace(".", "/") + ".py")
    found = functions(path if path.exists() else path.with_suffix("") / "__init__.py")
    return found[mutant.rpartition("__mutmut_")[0] + "__mutmut_orig"], found[mutant]


def widen(folder: Path) -> None:
    """Gives every function all tests of the files that hold one of its tests."""
    path = folder / "mutants" / "mutmut-stats.json"
    stats = json.loads(path.read_text(encoding="utf-8"))
    by_file: dict[str, list[str]] = {}
    for test in stats["duration_by_test"]:
        by_file.setdefault(test.partition("::")[0], []).append(test)
    stats["tests_by_mangled_function_name"] = {
        function: sorted({test for one in tests for test in by_file[one.partition("::")[0]]})
        for function, tests in stats["tests_by_mangled_function_name"].items()
    }
    path.write_text(json.dumps(stats), encoding="utf-8")


def interval(killed: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's interval of a proportion."""
    p, n = killed / total, total
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)


if __name__ == "__main__":
    main()

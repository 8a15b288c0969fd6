"""A newcomer's path, as it is typed: the README's command in an empty environment, then the commands of
docs/getting-started.md on a file of rows; seconds and CPU seconds of each, and what the base install brings.

python benchmarks/newcomer.py [--python FILE] [--out FILE] [--tiny]

--python  of an environment that has fedtune[demo,report] already: nothing is installed, and nothing said of it
--tiny    the same, with this Python, a tiny model and few rows
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import venv
from dataclasses import dataclass, field
from pathlib import Path

from claims import at_most

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
PAGE = ROOT / "docs" / "getting-started.md"
COUNT = (
    "import json, tomllib; from tests.brought import CORE, brought, size_of\n"
    "needs = tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies']\n"
    "more = brought(needs) - brought(CORE)\n"
    "print(json.dumps({'packages': len(more), 'bytes': size_of(more)}))"
)
MOST = {"packages": 20.0, "megabytes": 200.0, "install": 90.0}  # the aims
QUICK = ["--set=rounds=1", "--set=method.train.steps=1", "--set=evaluate.local=false"]


@dataclass
class Walk:
    """Runs commands in an environment and keeps what each has taken."""

    python: Path
    home: Path
    steps: list[dict[str, object]] = field(default_factory=list)

    def run(self, what: str, words: list[str], cwd: Path | None = None) -> None:
        print(f"$ {what}", flush=True)
        hidden = ("PYTHONPATH", "PYTHONDONTWRITEBYTECODE")
        known = {name: value for name, value in os.environ.items() if name not in hidden}
        began, used = time.perf_counter(), cpu()
        subprocess.run(words, cwd=cwd or self.home, env=known, check=True)
        took = {"seconds": time.perf_counter() - began, "cpu_seconds": cpu() - used}
        self.steps.append({"step": what} | {name: round(value, 1) for name, value in took.items()})

    def fedtune(self, *words: str, more: tuple[str, ...] = ()) -> None:
        self.run(f"fedtune {' '.join(words)}", [str(self.python), "-m", "fedtune", *words, *more])


def cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def readme_install() -> str:
    """Its first command, without the run that follows it."""
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    return next(line.strip() for line in lines if line.startswith("    pip install")).partition(" && ")[0]


def install(walk: Walk) -> None:
    command = readme_install()
    venv.create(walk.python.parents[1], with_pip=True)
    walk.run(command, ["sh", "-c", f"PATH={walk.python.parent}:$PATH {command}"], ROOT)
    walk.fedtune("simulate", more=("--quiet",))


def write_rows(folder: Path, tiny: bool) -> list[str]:
    """rows.csv; more arguments for init."""
    if tiny:
        from tests import small
        from tests import tiny as models

        rows = small.rows(60)
        lines = [",".join(rows[0]), *(",".join(row.values()) for row in rows)]
        (folder / "rows.csv").write_text("\n".join(lines) + "\n")
        return ["--model", str(models.bert(folder / "model"))]
    from tests.pages.blocks import blocks_of

    script = next(block.text for block in blocks_of(PAGE) if block.title == "make_rows.py")
    subprocess.run([sys.executable, "-c", script], cwd=folder, check=True)
    return []


def own_rows(walk: Walk, tiny: bool) -> None:
    """From a file to predictions, as the page has it."""
    model = write_rows(walk.home, tiny)
    walk.fedtune("init", "rows.csv", more=tuple(model))
    walk.fedtune("data", "rows.toml")
    walk.fedtune("check", "rows.toml")
    walk.fedtune("simulate", "rows.toml", more=tuple(QUICK if tiny else ["--quiet"]))
    walk.fedtune("report", "runs/rows")
    walk.fedtune("predict", "runs/rows", "rows.csv", "--to", "said.csv")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--python", type=Path, help="of an environment that has fedtune")
    parser.add_argument("--tiny", action="store_true", help="whether it runs: the figures mean nothing")
    parser.add_argument("--out", type=Path, help="also write what was measured as JSON")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        home = Path(place, "home")
        home.mkdir()
        there = Path(sys.executable) if options.tiny else options.python
        walk = Walk(there or Path(place, "venv", "bin", "python"), home)
        if there is None:
            install(walk)
        counted = subprocess.run(
            [str(walk.python), "-c", COUNT], cwd=ROOT, stdout=subprocess.PIPE, check=True
        )
        own_rows(walk, options.tiny)
    base = json.loads(counted.stdout)
    for step in walk.steps:
        print(f"{step['seconds']:>8} s  {step['cpu_seconds']:>8} CPU s  {step['step']}")
    print(
        f"base install: {base['packages']} packages, {base['bytes'] / 1e6:.0f} MB over torch, transformers and peft"
    )
    if options.out:
        hardware = f"{os.cpu_count()} cores, CPU only, {time.strftime('%B %Y')}"
        kept = {"hardware": hardware, "base": base, "steps": walk.steps}
        options.out.write_text(json.dumps(kept, indent=1) + "\n")
    print(json.dumps(claims(walk, base, there is None)))


def claims(walk: Walk, base: dict[str, int], installed: bool) -> list[dict[str, object]]:
    found = {"packages": float(base["packages"]), "megabytes": base["bytes"] / 1e6}
    if installed:
        found["install"] = float(str(walk.steps[0]["seconds"]))
    said = {
        "packages": "packages of the base install over torch, transformers and peft; other: the aim",
        "megabytes": "MB of the base install over torch, transformers and peft; other: the aim",
        "install": "seconds of the README's install; other: the aim",
    }
    return [at_most(said[name], value, MOST[name], 1.0) for name, value in found.items()]


if __name__ == "__main__":
    main()

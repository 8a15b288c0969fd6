"""docs/extending.md: its package, installed beside fedtune, is found by the names that its recipes say; a
package that cannot be used is named."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests import small

PAGE = Path(__file__).parents[1] / "docs" / "extending.md"
BLOCK = re.compile(r'^```\w+ title="([^"]+)"\n(.*?)^```$', re.S | re.M)
RUN = """
import json, sys
import fedtune
for tree in json.load(sys.stdin):
    try:
        result = fedtune.simulate(tree, runs=sys.argv[1])
        print(json.dumps({"figures": result.figures, "state": result.state_sha256, "rounds": result.rounds, "title": result.values.get("method", ""), "folder": str(result.folder)}))
    except fedtune.FedtuneError as error:
        print(json.dumps({"error": str(error)}))
"""


def install(
    place: Path, files: dict[str, str], points: dict[str, dict[str, str]], name: str = "my-fedtune"
) -> Path:
    """What pip would leave on the disk: the modules, and a .dist-info that names the entry points."""
    for path, text in files.items():
        (place / path).parent.mkdir(parents=True, exist_ok=True)
        (place / path).write_text(text)
    about = place / f"{name.replace('-', '_')}-1.0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    lines = [
        line
        for group, entries in points.items()
        for line in (f"[{group}]", *(f"{key} = {value}" for key, value in entries.items()))
    ]
    (about / "entry_points.txt").write_text("\n".join(lines) + "\n")
    return place


def played(place: Path, runs: Path, *trees: dict[str, Any]) -> list[dict[str, Any]]:
    environment = os.environ | {"PYTHONPATH": f"{place}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(runs)],
        input=json.dumps(trees),
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert not done.returncode, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    files = dict(BLOCK.findall(PAGE.read_text(encoding="utf-8")))
    points = tomllib.loads(files.pop("pyproject.toml"))["project"]["entry-points"]
    assert {
        f"my_fedtune/{value.partition(':')[0].partition('.')[2]}.py"
        for entries in points.values()
        for value in entries.values()
    } == files.keys()
    return install(tmp_path_factory.mktemp("site-packages"), {**files, "my_fedtune/__init__.py": ""}, points)


@pytest.fixture
def posted() -> Iterator[tuple[int, list[bytes]]]:
    """A port, and what is posted to it."""
    bodies: list[bytes] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port, bodies
        server.shutdown()


@pytest.mark.thorough
def test_every_example_of_the_page_runs(
    package: Path, tiny_bert: Path, tmp_path: Path, posted: tuple[int, list[bytes]]
) -> None:
    port, bodies = posted
    data, tab = small.write_rows(tmp_path), tmp_path / "rows.tab"
    tab.write_text("".join(f"{row['label']}\t{row['text']}\n" for row in small.rows()))

    def tree(**changes: Any) -> dict[str, Any]:
        return small.tree(tiny_bert, data, rounds=2) | changes

    def peft(**adapter: Any) -> dict[str, Any]:
        return {"type": "fedpeft", "adapter": adapter, "train": {"lr": 0.01, "steps": 2, "batch": 4}}

    plain, rule, clipped, bias, own, lines, halves, babu, told, deaf, words = played(
        package,
        tmp_path / "runs",
        tree(),
        tree(aggregate={"rule": "geometric-median", "passes": 2}),
        tree(chain=[{"step": "clip", "bound": 1e-3}]),
        tree(method=peft(kind="last-bias")),
        tree(method=peft(kind="last-bias", rank=3)),
        tree(
            data={
                "source": "lines",
                "path": str(tab),
                "max_length": 12,
                "test_share": 0.2,
                "client_test_share": 0.1,
            }
        ),
        tree(partition={"by": "halves"}),
        tree(method=peft(kind="lora", rank=2) | {"type": "fedbabu"}),
        tree(sinks=[{"sink": "webhook", "url": f"http://127.0.0.1:{port}"}]),
        tree(sinks=[{"sink": "webhook", "url": "http://127.0.0.1:1"}]),  # where nobody listens
        tree(metrics=[{"metric": "first-word"}, {"metric": "accuracy"}]),
    )
    figures = words["figures"]["federated"]
    assert figures["first_word"] == figures["accuracy"] and words["state"] == plain["state"]
    assert [json.loads(body)["round"] for body in bodies] == [1, 2]
    assert told["state"] == deaf["state"] == plain["state"] and told.get("rounds") == 2
    noted = [
        line for line in Path(deaf["folder"], "events.jsonl").read_text().splitlines() if "webhook" in line
    ]
    assert len(noted) == 1 and "is told nothing more" in noted[0]
    ran = [plain, rule, clipped, bias, lines, halves, babu]
    assert [one.get("error") for one in ran] == [None] * len(ran)
    assert (
        len({one["state"] for one in ran if one is not lines}) == len(ran) - 1
        and lines["state"] == plain["state"]
    )  # the same rows, read otherwise
    assert "C104: found method.adapter.rank with method.adapter.kind = 'last-bias'" in own["error"]
    from safetensors.numpy import load_file

    states = [load_file(next(Path(one["folder"], "state").glob("*.safetensors"))) for one in (plain, babu)]
    assert any("classifier" in name for name in states[0]) and not any(
        "classifier" in name for name in states[1]
    )


@pytest.mark.parametrize(
    ("points", "said"),
    [
        (
            {"fedtune.rules": {"mean": "odd:Rule"}},
            "C106.*taken.*, in plug-in 'mean' .fedtune.rules. of odd-package",
        ),
        (
            {"fedtune.steps": {"gone": "odd:Nowhere"}},
            "C106: found AttributeError.*, in plug-in 'gone' .fedtune.steps. of odd-package",
        ),
        (
            {"fedtune.methods": {"other": "odd:Rule"}},
            "C106.*subclass of fedtune.methods.interface.MethodTable",
        ),
        ({"fedtune.rules": {"another-name": "odd:Rule"}}, "C106.*rule is not Literal"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_package_that_cannot_be_used_is_named(
    points: dict[str, dict[str, str]], said: str, tmp_path: Path
) -> None:
    code = (
        "from typing import Literal\nfrom fedtune.aggregate.rule import Rule as Base\nclass Rule(Base):\n    "
        'rule: Literal["mean"] = "mean"\n'
    )
    place = install(tmp_path / "packages", {"odd.py": code}, points, "odd-package")
    environment = os.environ | {"PYTHONPATH": f"{place}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run(
        [sys.executable, "-m", "fedtune", "check"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and re.search(said, done.stderr) and "Traceback" not in done.stderr, (
        done.stderr
    )

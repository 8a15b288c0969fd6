"""The page about runs: what is on it, in words, pictures and numbers, and that it needs nothing from elsewhere."""

from __future__ import annotations

import csv
import io
import itertools
import json
import re
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest
from PIL import Image

from fedtune.report import csv_files, png_files, write_report
from fedtune.report.chart import factors, number
from fedtune.report.clients import left_out
from fedtune.report.picture import DARK, LIGHT, STANDING, style
from fedtune.report.read import RunData, read_events, read_run
from fedtune.report.tables import changes, results
from fedtune.report.words import figures, headline
from fedtune.report.write import page
from fedtune.runtime.folder import RunFolder, create
from fedtune.runtime.journal import Journal
from tests import small

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

RESULT: dict[str, Any] = {
    "metric": "accuracy",
    "base": 0.25,
    "local": 0.5,
    "federated": 0.75,
    "centralised": 0.875,
    "up_bytes_per_client_round": 2048,
    "down_bytes_per_client_round": 1024,
    "rounds": 2,
    "clients": 3,
    "left_out": 1,
    "seconds": 75.0,
    "epsilon": None,
    "phases": {},
    "state_sha256": "0123456789abcdef" * 4,
}


def run_data(**more: Any) -> RunData:
    known: dict[str, Any] = {
        "config": {},
        "result": RESULT,
        "partition": None,
        "experts": None,
        "started": None,
    }
    return RunData("run", **(known | more))


def test_figures_stand_in_the_results_with_their_intervals() -> None:
    told = {"accuracy": 0.75, "accuracy_low": 0.5, "accuracy_high": 0.9, "margin": 1.5, "rows": 8}
    one = run_data(result={**RESULT, "figures": {"federated": told, "base": {"margin": 0.0}}})
    found = {row[0]: row[1:] for row in results([one, run_data()]).rows}
    assert found["accuracy, federated"] == ["0.75", "0.75"]
    assert found["accuracy, federated, and its interval"] == ["0.75 (0.5 to 0.9 at 95 %)", ""]
    assert found["margin, federated"] == ["1.5", ""] and found["margin, base"] == ["0", ""]


@pytest.fixture(scope="module")
def runs(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> list[RunFolder]:
    """Two runs that differ by their seeds, and one with another rule, whose figures it tells."""
    root = tmp_path_factory.mktemp("runs")
    data = small.write_rows(root)
    evaluate = {"every": 1, "base": True, "local": True, "centralised": False, "clients": True}
    folders = []
    for more in ({"seed": 1}, {"seed": 2}, {"seed": 1, "aggregate": {"rule": "flexlora"}}):
        made = small.recipe(tiny_bert, data, rounds=2, evaluate=evaluate, **more)
        folder, _, events = small.play(made, root)
        (folder.path / "events.jsonl").write_text(
            "".join(json.dumps(event.record(), default=str) + "\n" for event in events)
        )
        folders.append(folder)
    return folders


class Elements(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def elements(page: str) -> list[tuple[str, dict[str, str | None]]]:
    parser = Elements()
    parser.feed(page)
    return parser.found


def test_the_headline_says_what_was_gained_by_what_and_at_which_cost() -> None:
    config = {
        "method": {"type": "fedpeft", "adapter": {"kind": "lora", "rank": 4}},
        "model": {"name": "/models/bert/"},
        "chain": [{"step": "sign"}],
        "aggregate": {"rule": "mean"},
    }
    assert headline(run_data(config=config)) == [
        "Accuracy rose from 0.25 (base model) to 0.75.",
        "That is 0.25 more than clients by themselves (0.5) and 0.12 less than training on all rows in one place (0.875).",
        "By fedpeft / lora of rank 4 on bert, combined by mean, sent through sign.",
        "At the cost of 2 rounds with 3 clients, 2.0 KiB up and 1.0 KiB down for each client and round, and "
        "1 min 15 s in all; 1 answers did not count.",
        "No differential privacy: nothing bounds what an update reveals.",
    ]
    fell = run_data(result=RESULT | {"metric": "perplexity", "base": 30.0, "federated": 12.0, "epsilon": 2.5})
    assert headline(fell)[0] == "Perplexity fell from 30 (base model) to 12, where less is better."
    assert headline(fell)[-1] == "Differential privacy: epsilon = 2.5."
    spent = run_data(
        result=RESULT | {"epsilon": 2.5, "privacy": ["epsilon 2.5 at delta 1e-05; hidden: a client"]}
    )
    assert headline(spent)[-1] == "Privacy: epsilon 2.5 at delta 1e-05; hidden: a client."
    assert figures(run_data())[0] == ("accuracy, federated", "0.75", "on the test set")
    assert figures(run_data())[-1] == ("time", "1 min 15 s", "2 rounds, 3 clients")
    going_on = run_data(
        result=None,
        config={"rounds": 9},
        rounds={3: {"metrics": {"loss": 0.5}, "up_bytes": 512, "down_bytes": 512}},
    )
    assert figures(going_on) == [
        ("rounds", "3 of 9", ""),
        ("training loss", "0.5", "0.5 at first"),
        ("bytes so far", "1.0 KiB", "up and down, all clients"),
    ]
    assert headline(going_on)[0] == "This run is not finished: 3 of 9 rounds are committed."


def test_who_was_left_out_and_why() -> None:
    out = {(n, "site"): {"round": n, "name": "site", "code": "F503", "text": f"why {n}"} for n in (1, 2, 4)}
    assert left_out(run_data(left_out=out)) == [["site", "F503", "3", "1 to 2, 4", "why 4"]]


def test_a_page_has_everything_and_needs_nothing(runs: list[RunFolder]) -> None:
    page = write_report(runs[:1]).read_text()
    assert "://" not in page and "<script" not in page and "@import" not in page
    assert not any(colour in page for colour in STANDING.names.values())  # each has become a variable
    for theme in (LIGHT, DARK):
        assert theme.css() in page
    known = elements(page)
    ids = Counter(attributes["id"] for _, attributes in known if "id" in attributes)
    assert not [name for name, count in ids.items() if count > 1]
    named = {attributes.get("href") for tag, attributes in known if tag == "a"}
    assert {"#charts", "#tables", "#recipe"} <= named and all(name[1:] in ids for name in named if name)
    pictures = [attributes for tag, attributes in known if tag == "svg"]
    assert len(pictures) == sum(tag == "figure" for tag, _ in known) == 8
    assert all(len(one["aria-label"] or "") > 20 and one["role"] == "img" for one in pictures)
    for title in ("Accuracy by round", "Training loss by round", "Accuracy against bytes", "client by client",
                  "Rows of each client by label", "Seconds of a client", "Time by phase", "Seconds of each round"):  # fmt: skip
        assert title in page
    headings = [int(tag[1]) for tag, _ in known if re.fullmatch("h[1-6]", tag)]
    assert headings[0] == 1 and all(after - before <= 1 for before, after in itertools.pairwise(headings))
    assert all(attributes.get("scope") for tag, attributes in known if tag == "th")
    assert page.count("<caption>") == page.count("<table>")
    assert len(page) < 400_000


def test_the_numbers_are_those_of_the_journal(runs: list[RunFolder], tmp_path: Path) -> None:
    paths = {path.stem: path for path in csv_files(runs[:1], tmp_path / "numbers")}
    journal = Journal(runs[0].journal)
    try:
        losses = [row.metrics["loss"] for row in journal.rounds()]
    finally:
        journal.close()
    rows = list(csv.reader(io.StringIO(paths["loss"].read_text())))
    assert rows[0] == ["round", "run"] and [float(row[1]) for row in rows[1:]] == pytest.approx(
        losses, rel=1e-3
    )
    rows = list(csv.reader(io.StringIO(paths["partition"].read_text())))
    labels = Counter(row["label"] for row in small.rows())
    assert rows[0][3:] == sorted(labels) and len(rows) == 5
    held = sum(int(row[1]) + int(row[2]) for row in rows[1:])
    assert held == len(small.rows()) - 24  # a fifth is the test set
    result = runs[0].read_json("result.json")
    rows = list(csv.reader(io.StringIO(paths["time"].read_text())))
    assert float(rows[-1][1]) == pytest.approx(result["seconds"], abs=0.1)


def test_runs_side_by_side(runs: list[RunFolder]) -> None:
    target = write_report(runs)
    assert target == runs[0].path.parent / "comparison.html"
    page = target.read_text()
    assert "3 runs side by side" in page and "run (2 seeds)" in page
    table = re.search(r"<caption>What differs</caption>.*?</table>", page, re.S)
    assert table
    keys = re.findall(r'<th scope="row">(.*?)</th>', table[0])
    assert "seed" in keys and "aggregate.rule" in keys and "rounds" not in keys
    assert "flexlora" in table[0]


def test_many_runs_are_told_by_means(runs: list[RunFolder]) -> None:
    known = [read_run(folder) for folder in runs]
    again = replace(known[2], config=known[2].config | {"seed": 2})
    trials = [
        replace(run, name=f"{trial:03}-seed-{run.seed}")
        for trial, run in zip((1, 1, 2, 2), (*known, again), strict=True)
    ]
    page_text = page(trials, [*runs, runs[2]])
    table = re.search(r"<caption>Means over seeds, best first</caption>.*?</table>", page_text, re.S)
    assert table and set(re.findall(r'<th scope="row">(.*?)</th>', table[0])) == {
        "rule mean (2 seeds)", "rule flexlora (2 seeds)"
    }  # fmt: skip
    two = [run.quality()[-1][1] for run in known[:2]]
    assert f"{number(fmean(two))} ± {number(stdev(two), 2)}" in table[0]
    lead = re.search(r'<p class="lead">(.*?)</p>', page_text, re.S)
    assert lead and page_text.count('class="lead"') == 1 and "4 runs of 2 recipes." in lead[1]
    assert page_text.count("what differs from the defaults") == 2  # one table, whose caption stands twice


def test_bytes_far_apart_have_plain_numbers_on_their_axis() -> None:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(style(LIGHT)):
        figure = Figure()
        axes = figure.add_subplot()
        axes.plot([3, 200], [0, 1])
        factors(axes)
        figure.draw_without_rendering()
        shown = [label.get_text() for label in axes.get_xticklabels(which="both")]
    assert {"5", "10", "100"} <= set(shown) and not any("$" in text for text in shown)


def test_pictures_by_themselves(runs: list[RunFolder], tmp_path: Path) -> None:
    for path in png_files(runs[2:], tmp_path):
        with Image.open(path) as picture:
            assert picture.width > 600 and picture.getpixel((1, 1))[:3] == (255, 255, 255)  # type: ignore[index]
            assert len(set(picture.convert("L").resize((60, 40)).getdata())) > 3  # something is drawn
    assert any(path.stem.startswith("rule-") for path in tmp_path.iterdir())


def test_what_differs_from_the_defaults(runs: list[RunFolder]) -> None:
    found = {key: value for key, value, _ in changes(runs[2])}
    assert found["aggregate.rule"] == "flexlora" and found["data.source"] == "jsonl"
    assert found["method.adapter.rank"] == "2" and "method.type" not in found and "limits.weight" not in found


def test_a_run_that_is_going_on_and_half_a_line(tmp_path: Path) -> None:
    folder = create(tmp_path, "", "run")
    assert list(read_events(folder)) == []
    done = {"event": "RoundDone", "round": 1, "members": 3, "left_out": 0, "up_bytes": 1, "down_bytes": 1,
            "seconds": 1.5, "metrics": {"loss": 1.0}}  # fmt: skip
    (folder.path / "events.jsonl").write_text(json.dumps(done) + "\n" + json.dumps(done)[:20])
    assert list(read_events(folder)) == [done]
    folder.write_json("config.json", {"rounds": 3})
    page = write_report([folder]).read_text()
    assert "not finished: 1 of 3 rounds" in page and "Training loss by round" in page
    assert read_run(folder).curve("loss") == [(1, 1.0)]

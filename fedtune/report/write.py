"""report.html, and the same as pictures or tables in files of their own."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fedtune.disk import disk_errors, write_atomic
from fedtune.errors import FedtuneError
from fedtune.overrides import flat
from fedtune.plain import plain
from fedtune.report.chart import Chart
from fedtune.report.clients import clients
from fedtune.report.curves import curves, slug
from fedtune.report.effects import effects
from fedtune.report.groups import groups_of, overall, summary
from fedtune.report.picture import DARK, LIGHT, png, svg
from fedtune.report.read import RunData, read_run
from fedtune.report.tables import SINGLY, Table, shorten, tables
from fedtune.report.time import times
from fedtune.report.words import figures, headline, title
from fedtune.runtime.folder import RunFolder

NEEDED = ("matplotlib", "jinja2")
ROWS = 500  # of a table in the page; --csv writes all


def write_report(folders: Sequence[RunFolder], to: Path | None = None) -> Path:
    """One page about one run or several; returns its path: `to`, or report.html of the run, or
    comparison.html beside several. Raises D208, R402, R404."""
    require()
    runs = [read_run(folder) for folder in folders]
    default = (
        folders[0].path / "report.html" if len(folders) == 1 else folders[0].path.parent / "comparison.html"
    )
    target = to or default
    write_atomic(target, page(runs, folders).encode())
    return target


def require() -> None:
    for package in NEEDED:
        if find_spec(package) is None:
            raise FedtuneError(
                "D208",
                sentence=f"a report is drawn with {package}, which is not installed",
                do="run: pip install 'fedtune[report]'",
            )


def headlines(runs: Sequence[RunData]) -> list[tuple[str, list[str]]]:
    """Run by run; many runs in two sentences."""
    if len(runs) > SINGLY:
        return [("", overall(groups_of(runs)))]
    return [(run.name, headline(run)) for run in runs]


def charts(runs: Sequence[RunData]) -> Iterator[Chart]:
    groups = groups_of(runs)
    yield from curves(groups)
    yield from clients(groups)
    yield from effects(runs)
    yield from times(groups)


def all_tables(runs: Sequence[RunData], folders: Sequence[RunFolder]) -> list[Table]:
    """In the order of the page."""
    groups = groups_of(runs)
    means = [summary(groups)] if len(runs) > max(1, len(groups)) or len(runs) > SINGLY else []
    return [*means, *tables(runs, folders)]


def page(runs: Sequence[RunData], folders: Sequence[RunFolder], live: dict[str, Any] | None = None) -> str:
    """The HTML. `live` adds what a page of a server says beside the run (fedtune ui)."""
    from jinja2 import Environment

    env = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = env.from_string(files("fedtune.report").joinpath("page.html").read_text(encoding="utf-8"))
    named = [run.name for run in runs]
    return template.render(
        title=plain(title(runs)),
        light=LIGHT.css(),
        dark=DARK.css(),
        headlines=[(plain(name), [plain(text) for text in texts]) for name, texts in headlines(runs)],
        figures=figures(runs[0]) if len(runs) == 1 else [],
        charts=[
            (chart, svg(chart.draw, f"f{place}", plain(chart.alt)))
            for place, chart in enumerate(charts(runs))
        ],
        tables=[shorten(table) for table in all_tables(runs, folders)],
        notes=[
            (name, [plain(note) for note in run.notes])
            for name, run in zip(named, runs, strict=True)
            if run.notes
        ],
        samples=(runs[0].result or {}).get("samples") or [] if len(runs) == 1 else [],
        recipes=[(name, recipe(run)) for name, run in zip(named, runs, strict=True)],
        most=ROWS,
        clean=plain,
        live=live,
    )


def recipe(run: RunData) -> list[tuple[str, str]]:
    """All keys and values."""
    return [(key, plain(json.dumps(value))) for key, value in flat(run.config).items()]


def png_files(folders: Sequence[RunFolder], to: Path) -> list[Path]:
    """Every picture of the page as a PNG; returns their paths. Raises D208, R402, R404."""
    require()
    made = []
    for chart in charts([read_run(folder) for folder in folders]):
        made.append(to / f"{chart.slug}.png")
        write_in(made[-1], png(chart.draw))
    return made


def csv_files(folders: Sequence[RunFolder], to: Path) -> list[Path]:
    """The numbers of every picture, and every table, as CSV; returns their paths. Raises D208, R402, R404."""
    require()
    runs = [read_run(folder) for folder in folders]
    found: dict[str, Chart | Table] = {chart.slug: chart for chart in charts(runs)}
    for table in all_tables(runs, folders):
        name = table.slug if table.slug not in found else f"{table.slug}-{slug(table.title)}"
        found[name] = table
    for name, one in found.items():
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([one.head, *one.rows])
        write_in(to / f"{name}.csv", text.getvalue().encode())
    return [to / f"{name}.csv" for name in found]


def write_in(path: Path, content: bytes) -> None:
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, content)

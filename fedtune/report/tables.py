"""Tables of a page: results, recipes and where they differ, versions, who was left out."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedtune.errors import FedtuneError
from fedtune.overrides import flat
from fedtune.report.chart import brief, number
from fedtune.report.clients import left_out
from fedtune.report.read import RunData
from fedtune.report.words import privacy_rows
from fedtune.runtime.compare import differing
from fedtune.runtime.folder import RunFolder, recipe_of
from fedtune.settings import Settings, union_of
from fedtune.sinks.console import kept_name, size
from fedtune.sinks.standing import duration

SINGLY = 3  # runs of which each has a paragraph and tables of its own; of more, the first has them
IDENTITY = ("name", "sinks")  # keys of a recipe that do not change what a run does


@dataclass(frozen=True)
class Table:
    slug: str
    title: str
    head: tuple[str, ...]
    rows: Sequence[Sequence[str]]
    about: str = ""


def tables(runs: Sequence[RunData], folders: Sequence[RunFolder]) -> Iterator[Table]:
    """All that have something to say, in the order of the page."""
    made = [results(runs)]
    made += [differences(runs)] if len(runs) > 1 else []
    for run in runs:
        more = f" of {run.name}" if len(runs) > 1 else ""
        made.append(
            Table("left-out", f"Left out{more}", ("client", "code", "times", "rounds", "why"), left_out(run))
        )
        made.append(Table("privacy", f"Privacy spent{more}", ("figure", "value"), privacy_rows(run)))
    for run, folder in list(zip(runs, folders, strict=True))[: len(runs) if len(runs) <= SINGLY else 1]:
        more = f" of {run.name}" if len(runs) > 1 else ""
        changed = [[key, value, default] for key, value, default in changes(folder)]
        made.append(
            Table(
                "recipe",
                f"Recipe{more}: what differs from the defaults",
                ("key", "value", "default"),
                changed,
            )
        )
        found = (run.result or {}).get("versions") or {}
        made.append(
            Table("versions", f"Versions{more}", ("package", "version"), [[*one] for one in found.items()])
        )
    yield from (table for table in made if table.rows)


def results(runs: Sequence[RunData]) -> Table:
    """Scores and costs, a column for each run."""
    metric = next((run.metric for run in runs if run.metric), "")
    rows: list[list[str]] = []

    def row(name: str, values: Sequence[Any], show: Any = number) -> None:
        if any(value is not None for value in values):
            rows.append([name, *("" if value is None else show(value) for value in values)])

    finished = [run.result or {} for run in runs]
    for name in ("base model", "local only"):
        row(f"{metric}, {name}", [run.lines.get(name) for run in runs])
    row(f"{metric}, {kept_name(finished[0]) if len(runs) == 1 and finished[0] else 'federated'}",
        [run.federated for run in runs])  # fmt: skip
    row(f"{metric}, federated, last round", [one.get("federated_last") for one in finished])
    row(f"{metric}, centralised", [run.lines.get("centralised") for run in runs])
    for name in dict.fromkeys(name for one in finished for name in one.get("also") or {}):
        row(f"{metric}, {name}", [(one.get("also") or {}).get(name) for one in finished])
    for whose in ("federated", "base"):
        shown = [in_words((one.get("figures") or {}).get(whose) or {}) for one in finished]
        for name in dict.fromkeys(name for one in shown for name in one):
            more = ", and its interval" if name == metric else ""  # the score itself stands above
            row(f"{name.replace('_', ' ')}, {whose}{more}", [one.get(name) for one in shown], str)
    for key, name in (
        ("mean", "mean of clients"),
        ("worst", "worst client"),
        ("spread", "spread of clients"),
    ):
        row(f"{metric}, {name}", [(one.get("per_client") or {}).get(key) for one in finished])
    row("rounds", [one.get("rounds") for one in finished])
    row("clients", [one.get("clients") for one in finished])
    row("answers left out", [one.get("left_out") for one in finished])
    row("up for each client and round", [one.get("up_bytes_per_client_round") for one in finished], size)
    row("down for each client and round", [one.get("down_bytes_per_client_round") for one in finished], size)
    row("time", [one.get("seconds") for one in finished], duration)
    row("peak memory", [one.get("peak_rss_bytes") for one in finished], size)
    row("state", [one.get("state_sha256") for one in finished], lambda text: str(text)[:16])
    return Table("results", "Results", ("", *(run.name for run in runs)), rows)


def in_words(figures: Mapping[str, Any]) -> dict[str, str]:
    """Figures of a model on the test set, with their interval where they have one.

    >>> in_words({"accuracy": 0.8, "accuracy_low": 0.72, "accuracy_high": 0.86, "rows": 40})
    {'accuracy': '0.8 (0.72 to 0.86 at 95 %)'}
    """
    found = {}
    for name, value in figures.items():
        if name != "rows" and not name.endswith(("_low", "_high")):
            ends = [figures.get(f"{name}{end}") for end in ("_low", "_high")]
            between = "" if None in ends else f" ({number(ends[0])} to {number(ends[1])} at 95 %)"
            found[name] = number(value) + between
    return found


def differences(runs: Sequence[RunData]) -> Table:
    """Keys of the recipes that are not the same in all runs."""
    trees = [flat({k: v for k, v in run.config.items() if k not in IDENTITY}) for run in runs]
    rows = [
        [key, *("" if value is None else said(value) for value in values)]
        for key, values in differing(trees).items()
    ]
    return Table("differences", "What differs", ("key", *(run.name for run in runs)), rows)


def said(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def changes(folder: RunFolder) -> list[tuple[str, str, str]]:
    """Key, value and default of everything that the run's recipe says otherwise; all keys, where this version
    cannot read the recipe."""
    try:
        recipe = recipe_of(folder)
    except FedtuneError:
        return [(key, said(value), "") for key, value in flat(folder.read_json("config.json")).items()]
    return list(changed(recipe))


def changed(table: Settings, path: str = "") -> Iterator[tuple[str, str, str]]:
    """A table that another class could have read is compared with that class's own defaults."""
    for name, field in type(table).model_fields.items():
        value = getattr(table, name)
        default = None if field.is_required() else field.get_default(call_default_factory=True)
        if isinstance(value, Settings):
            union = union_of(type(table), name)
            if union and getattr(value, union.discriminator) != union.default:
                key = f"{path}{name}.{union.discriminator}"
                yield key, said(getattr(value, union.discriminator)), union.default
            yield from changed(value, f"{path}{name}.")
        elif value != default:
            shown = table.model_dump(mode="json", include={name})[name]
            yield f"{path}{name}", said(shown), "" if default is None else said(plain_default(default))


def plain_default(value: Any) -> Any:
    """As JSON says it."""
    return (
        list(value)
        if isinstance(value, tuple)
        else value
        if isinstance(value, (int, float, str, list))
        else str(value)
    )


def shorten(table: Table, most: int = 200) -> Table:
    """As a page shows it: long cells are cut."""
    return Table(
        table.slug,
        table.title,
        table.head,
        [[brief(c, most) for c in row] for row in table.rows],
        table.about,
    )

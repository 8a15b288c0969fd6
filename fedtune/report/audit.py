"""One page about a run for a data-protection officer, in Markdown: who took part, what left each site and by
which steps it was covered, what was refused, versions and hashes. All of it is read from the run's folder."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from statistics import fmean
from typing import Any

from fedtune import transforms
from fedtune.config import Recipe, method_of
from fedtune.errors import FedtuneError
from fedtune.plain import plain
from fedtune.report.read import read_events
from fedtune.runtime.exposure import exposure
from fedtune.runtime.folder import RunFolder, recipe_of
from fedtune.runtime.journal import AnswerRecord, Journal
from fedtune.runtime.moves import PARTS
from fedtune.runtime.quarantine import absences, said_of
from fedtune.trust.chained_log import FILE, verify


def audit_report(folder: RunFolder) -> str:
    """The page. Raises R402, R403 for a journal that is not in order, T709 for such a log."""
    recipe, journal = recipe_of(folder), Journal(folder.journal)
    try:
        journal.check()
        facts, rounds, answers = journal.facts(), journal.rounds(), journal.answers()
        said, out = said_of(journal), absences(journal)
        parts_of = journal.phases(PARTS)
    finally:
        journal.close()
    names = recipe.deploy.sites or json.loads(facts.get("clients", "[]"))
    events = list(read_events(folder))
    left_out = [one for one in events if one["event"] == "ClientLeftOut"]
    parts = [
        f"# Run {cell(folder.path.name)}",
        first_lines(recipe, facts, events, len(rounds)),
        "## Who took part",
        table(
            ("client", "asked", "counted", "bytes received", "bytes sent to it", "weight in the last answer"),
            (member(number, name, answers) for number, name in enumerate(names)),
        ),
        "## What left each site, and what covered it",
        table(("question", "what the coordinator sees", "steps on the way"), seen(recipe, facts)),
        "## Differential privacy",
        privacy(folder),
        "## What each member contributed (watch.influence)",
        table(
            ("client", "answers", "mean norm", "mean cosine to the others", "the mean moves without it"),
            contributed(parts_of.values()),
        ),
        "## Answers that were refused or did not come",
        table(
            ("round", "client", "code", "why"),
            ([str(one["round"]), one["name"], one["code"], one["text"]] for one in left_out),
        ),
        "## Members left out, and alarms",
        table(("client", "rounds", "why"), absent(said, out)),
        table(
            ("round", "what", "alarm"),
            ([str(one["round"]), one["what"], one["text"]] for one in events if one["event"] == "Alarm"),
        ),
        "## Versions and hashes",
        table(("what", "value"), hashes(facts, rounds[-1].state_sha256 if rounds else "")),
        log_of(folder),
    ]
    return "\n\n".join(parts) + "\n"


def first_lines(recipe: Recipe, facts: dict[str, str], events: Sequence[dict[str, Any]], rounds: int) -> str:
    times = [one["at"] for one in events if "at" in one]
    when = " to ".join(
        f"{datetime.fromtimestamp(at, UTC):%Y-%m-%d %H:%M} UTC" for at in (times[:1] + times[-1:])
    )
    about = f"{method_of(recipe).facts.title} on `{cell(recipe.model.name)}` (task {recipe.data.task})"
    return f"{about}; {rounds} of {recipe.rounds} rounds; {when or 'no events'}."


def member(number: int, name: str, answers: Iterable[tuple[int, AnswerRecord]]) -> list[str]:
    own = [answer for _, answer in answers if answer.client == number]
    counted = [answer for answer in own if answer.outcome == "ok"]
    up, down = sum(answer.up_bytes for answer in own), sum(answer.down_bytes for answer in own)
    weight = f"{counted[-1].weight:g}" if counted else "-"
    return [name, str(len(own)), str(len(counted)), f"{up:,}", f"{down:,}", weight]


def seen(recipe: Recipe, facts: dict[str, str]) -> list[list[str]]:
    """As `fedtune check` says it, from the declarations that the runtime obeys."""
    method, chain = method_of(recipe), transforms.build(recipe.chain)
    costs, labels = method.capabilities.costs, json.loads(facts.get("labels", "[]"))
    try:
        plan = costs.plan(recipe.model, recipe.data.task, len(labels)) if costs else None
        rows = exposure(method, chain, plan, recipe.select)
    except FedtuneError as error:  # the base model is not on this machine
        return [["-", f"the base model cannot be read here: {error}", "-"]]
    return [[row.verb, row.sees, ", ".join(row.through) or "none"] for row in rows]


def privacy(folder: RunFolder) -> str:
    """What the run's result says of it."""
    result = folder.read_json("result.json") if (folder.path / "result.json").exists() else {}
    said = result.get("privacy") or []
    return "\n".join(f"* {cell(line)}" for line in said) or "No differential privacy."


def contributed(rounds: Iterable[Mapping[str, Mapping[str, Mapping[str, float]]]]) -> list[list[str]]:
    """Means over a member's answers, whatever they answered to."""
    found: dict[str, list[Mapping[str, float]]] = {}
    for verbs in rounds:
        for members in verbs.values():
            for name, part in members.items():
                found.setdefault(name, []).append(part)
    return [
        [
            name,
            str(len(own)),
            *(f"{fmean(one[key] for one in own):.3g}" for key in ("norm", "cosine", "alone")),
        ]
        for name, own in sorted(found.items())
    ]


def absent(said: dict[str, dict[str, Any]], out: dict[str, list[list[int | None]]]) -> list[list[str]]:
    made = []
    for name, spans in out.items():
        rounds = ", ".join(f"{first} to {end - 1 if end else 'the end'}" for first, end in spans)
        made.append([name, rounds, said.get(name, {}).get("why") or "-"])
    return made


def hashes(facts: dict[str, str], state: str) -> list[list[str]]:
    rows = [
        ["recipe (SHA-256)", facts.get("recipe", "")],
        ["base model (SHA-256)", facts.get("base", "")],
        ["data as read here (SHA-256)", facts.get("data", "")],
        ["last state (SHA-256)", state],
    ]
    return rows + [[name, value] for name, value in json.loads(facts.get("versions", "{}")).items()]


def log_of(folder: RunFolder) -> str:
    path = folder.path / FILE
    if not path.exists():
        return "There is no audit log; the journal's chain of states is in order."
    found = verify(path)
    signed = f"signed by {found.signer}" if found.signer else "not signed"
    return f"The audit log has {found.lines} lines in order, {signed}; the last one's hash is `{found.last}`."


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; "None." where there are no rows."""
    made = [f"| {' | '.join(map(cell, row))} |" for row in rows]
    if not made:
        return "None."
    return "\n".join([f"| {' | '.join(head)} |", "|" + "---|" * len(head), *made])


def cell(text: str) -> str:
    """Names and sentences come from clients: nothing of them may end a cell or begin HTML.

    >>> cell("a|b <i>\\n`c`")
    'a\\\\|b &lt;i&gt;·c'
    """
    line = " ".join(plain(text).split()).replace("`", "")
    return line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("|", "\\|")

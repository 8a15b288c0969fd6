"""What the pages of a folder of runs show: the runs, each run's report so far, and what goes on now."""

from __future__ import annotations

import json
import secrets
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from fedtune.events import event_of
from fedtune.plain import plain
from fedtune.report.chart import number
from fedtune.report.picture import DARK, LIGHT
from fedtune.report.read import RunData, read_events, read_run
from fedtune.report.words import chain, what
from fedtune.report.write import page
from fedtune.runtime.folder import RunFolder
from fedtune.sinks.live import clients_in_words, now_in_words
from fedtune.sinks.standing import Standing, duration
from fedtune.ui.serve import Answer

FAILED = "failed.json"  # as deploy/coordinator_run.py calls it; simulations do not need its packages
AGAIN = 2.0  # seconds for which a drawn page is shown again, whatever has happened since
LOG = 16_384  # bytes of a log's end that are shown
DRAWN = 16  # pages that are kept
SHARED = ("update.js", "ui.css")  # stand in both kinds of pages
STATES = ("going on", "finished", "failed", "stopped")
LINES = ("events.jsonl", "result.json", FAILED)  # files whose change makes another page


@dataclass
class Drawn:
    stamp: str
    at: float
    body: str


@dataclass
class RunPages:
    """The pages of all runs under one folder. Pictures are drawn by one request at a time, and only when
    there is something new."""

    runs: Path
    again: float = AGAIN
    drawn: dict[str, Drawn] = field(default_factory=dict)
    drawing: threading.Lock = field(default_factory=threading.Lock)

    def __call__(self, parts: list[str]) -> Answer | None:
        known = {path.parent.name: RunFolder(path.parent) for path in sorted(self.runs.glob("*/config.json"))}
        match parts:
            case []:
                return Answer(self.overview(known))
            case ["stamp"]:
                return Answer(
                    json.dumps({"stamp": ",".join(map(stamp, known.values())), "now": ""}), "application/json"
                )
            case [name] if folder := known.get(unquote(name)):
                return Answer(self.run(folder))
            case [name, "stamp"] if folder := known.get(unquote(name)):
                said = {"stamp": self.stamp(folder), "now": now_of(folder)}
                return Answer(json.dumps(said), "application/json")
        return None

    def stamp(self, folder: RunFolder) -> str:
        """Of the page that is there to be had: one that was drawn just now is not drawn again."""
        before = self.drawn.get(folder.path.name)
        return before.stamp if before and time.monotonic() < before.at + self.again else stamp(folder)

    def overview(self, known: dict[str, RunFolder]) -> str:
        rows = sorted(map(row_of, known.values()), key=lambda row: (row["state"] != "going on", -row["at"]))
        states = Counter(row["state"] for row in rows)
        counted = "".join(f" · {states[state]} {state}" for state in STATES if states[state])
        return rendered("overview.html", rows=rows, where=plain(str(self.runs)), counted=counted)

    def run(self, folder: RunFolder) -> str:
        with self.drawing:
            now = self.stamp(folder)
            if (before := self.drawn.get(folder.path.name)) and before.stamp == now:
                return before.body
            nonce, data = secrets.token_urlsafe(16), read_run(folder)
            here, said = list(sites(data, self.runs)), list(logs(data, folder, self.runs))
            live = rendered(
                "live.html", nonce, now=now_of(folder), state=state_of(folder), sites=here, logs=said,
                done=max(data.rounds, default=0), rounds=data.config.get("rounds"),
            )  # fmt: skip
            body = page([data], [folder], {"nonce": nonce, "html": live})
            self.drawn[folder.path.name] = Drawn(now, time.monotonic(), body)
            while len(self.drawn) > DRAWN:
                self.drawn.pop(next(iter(self.drawn)))
            return body


def rendered(name: str, nonce: str = "", **values: Any) -> str:
    """A template of this folder, with the script that keeps the page up to date; every value is escaped."""
    from jinja2 import Environment

    env = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    text, script, css = (files("fedtune.ui").joinpath(one).read_text("utf-8") for one in (name, *SHARED))
    known = {"light": LIGHT.css(), "dark": DARK.css(), "nonce": nonce or secrets.token_urlsafe(16)}
    return env.from_string(text).render(script=script, css=css, **known, **values)


def stamp(folder: RunFolder) -> str:
    """Changes with what the page shows."""
    known = [folder.path / name for name in LINES]
    sizes = [str(path.stat().st_size) if path.exists() else "-" for path in known]
    return ".".join([*sizes, state_of(folder).replace(" ", "-")])


def standing_of(folder: RunFolder) -> Standing:
    made = Standing()
    for record in read_events(folder):
        if event := event_of(record):
            made.told(event)
    return made


def now_of(folder: RunFolder) -> str:
    """A line about a run that goes on; "" for one that has ended."""
    if (folder.path / "result.json").exists() or (folder.path / FAILED).exists():
        return ""
    at = standing_of(folder)
    round_of = f"round {at.round} of {at.rounds}" if at.rounds else ""
    words = (round_of, clients_in_words(at), now_in_words(at))
    return plain(" · ".join(text for text in words if text)) or "nothing told yet"


def state_of(folder: RunFolder) -> str:
    if (folder.path / "result.json").exists():
        return "finished"
    if (folder.path / FAILED).exists():
        return "failed"
    from fedtune.disk import took

    try:
        with (folder.path / "lock").open("r") as handle:
            return "stopped" if took(handle) else "going on"
    except OSError:
        return "stopped"


def row_of(folder: RunFolder) -> dict[str, Any]:
    data, state = read_run(folder), state_of(folder)
    return {
        "name": plain(folder.path.name),
        "link": quote(folder.path.name, safe="") + "/",
        "what": plain(" · ".join(text for text in (what(data), chain(data)) if text)),
        "state": state,
        "done": max(data.rounds, default=0),
        "rounds": data.config.get("rounds", "?"),
        "score": score_of(data),
        "at": last_told(folder),
    } | (going_on(folder) if state == "going on" else {"time": time_of(data), "now": ""})


def going_on(folder: RunFolder) -> dict[str, str]:
    """What a run does, and how long it will."""
    at = standing_of(folder)
    left = at.seconds_left()
    words = (f"{at.answered} of {at.members} clients" if at.members else "", now_in_words(at))
    return {
        "time": f"about {duration(left)} left" if left else "",
        "now": plain(" · ".join(text for text in words if text)),
    }


def time_of(data: RunData) -> str:
    return duration(data.result["seconds"]) if data.result else ""


def score_of(data: RunData) -> str:
    """On the test set, of a run that has ended; until then the last one on held-out rows, or the loss."""
    if data.federated is not None:
        return f"{data.metric} {number(data.federated, 3)}"
    if scored := data.quality():
        return f"{data.metric} {number(scored[-1][1], 3)}, held out"
    losses = data.curve("loss")
    return f"loss {number(losses[-1][1], 3)}" if losses else ""


def last_told(folder: RunFolder) -> float:
    path = folder.path / LINES[0]
    return path.stat().st_mtime if path.exists() else 0.0


def sites(data: RunData, runs: Path) -> Iterator[dict[str, str]]:
    """Of a run on real sites: who is here, and what each did last."""
    names = (data.config.get("deploy") or {}).get("sites") or ()
    if not names:
        return
    from fedtune.deploy.members import NODES, read_nodes
    from fedtune.deploy.server import HOME

    here = read_nodes(runs / HOME / NODES)
    for name in names:
        rounds = [number for number, who in data.answers if who == name]
        last = data.answers.get((max(rounds), name)) if rounds else None
        out = [number for number, who in data.left_out if who == name]
        yield {
            "name": plain(str(name)),
            "here": "has a node" if name in here else "not here",
            "last": f"round {last['round']}, {duration(max(0.0, time.time() - last['at']))} ago"
            if last
            else "never",
            "counted": str(len(rounds)),
            "out": str(len(out)),
        }


def logs(data: RunData, folder: RunFolder, runs: Path) -> Iterator[tuple[str, str]]:
    """The ends of the coordinator's logs, of a run on real sites."""
    if not (folder.path / "deploy.json").exists():
        return
    from fedtune.deploy.server import HOME

    for path in [*sorted((runs / HOME / "logs").glob("*.log")), folder.path / "crash.log"]:
        if path.is_file():
            yield path.name, end_of(path)


def end_of(path: Path) -> str:
    with path.open("rb") as file:
        file.seek(0, 2)
        file.seek(max(0, file.tell() - LOG))
        lines = file.read(LOG).decode(errors="replace").splitlines()
    return "\n".join(plain(line, 400) for line in lines[-100:])

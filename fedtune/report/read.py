"""What a run's folder says, as one value: finished, going on or cut short."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from fedtune.errors import FedtuneError
from fedtune.runtime.data_card import FILE as DATA
from fedtune.runtime.folder import EFFECTS, EXPERTS, RunFolder
from fedtune.runtime.privacy import epsilon_by_round

Record = dict[str, Any]


@dataclass(frozen=True)
class RunData:
    """One run.

    rounds  RoundDone by number; one that a resumed run has told twice counts once, as it ended
    answers, left_out  ClientDone and ClientLeftOut, once for each client and round
    scores  Scored: phase -> round -> record
    epsilon  unit that is hidden -> (round, the most that was spent of one client until then)
    """

    name: str
    config: Record
    result: Record | None
    partition: Record | None
    experts: Record | None
    started: Record | None
    rounds: dict[int, Record] = field(default_factory=dict)
    answers: dict[tuple[int, str], Record] = field(default_factory=dict)
    left_out: dict[tuple[int, str], Record] = field(default_factory=dict)
    scores: dict[str, dict[int, Record]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    effects: Record | None = None
    epsilon: dict[str, list[tuple[int, float]]] = field(default_factory=dict)

    @property
    def seed(self) -> int:
        return int(self.config.get("seed", 0))

    @cached_property
    def metric(self) -> str:
        """Of the scores: accuracy, perplexity; "" where there is none."""
        if self.result and self.result.get("metric"):
            return str(self.result["metric"])
        found = [one["metric"] for by_round in self.scores.values() for one in by_round.values()]
        return str(found[0]) if found else ""

    @property
    def lines(self) -> dict[str, float]:
        """What the federation is compared with: name -> score."""
        result = self.result or {}
        found = {
            "base model": result.get("base") or self._scored("base"),
            "local only": result.get("local"),
            "centralised": result.get("centralised") or self._scored("centralised"),
        }
        return {name: float(value) for name, value in found.items() if value is not None}

    @property
    def federated(self) -> float | None:
        return (self.result or {}).get("federated")

    @property
    def local_scores(self) -> dict[str, float]:
        """Client (and seed) -> score of its training by itself."""
        return {
            phase.removeprefix("local:"): next(iter(by_round.values()))["value"]
            for phase, by_round in self.scores.items()
            if phase.startswith("local:")
        }

    def _scored(self, phase: str) -> float | None:
        by_round = self.scores.get(phase)
        return next(iter(by_round.values()))["value"] if by_round else None

    def curve(self, figure: str) -> list[tuple[int, float]]:
        """A figure of the rounds: (round, value)."""
        values = ((number, one["metrics"].get(figure)) for number, one in self.rounds.items())
        return [(number, value) for number, value in values if value is not None]

    def quality(self) -> list[tuple[int, float]]:
        """Scores by round on rows that clients hold out."""
        scores = sorted(self.scores.get("held-out", {}).items())
        return [(number, one["value"]) for number, one in scores if one["value"] is not None]

    def traffic(self) -> dict[int, float]:
        """Bytes up and down in all, after each round."""
        total, found = 0.0, {}
        for number, one in self.rounds.items():
            total += one["up_bytes"] + one["down_bytes"]
            found[number] = total
        return found

    @property
    def clients(self) -> list[str]:
        """All that are known, in the order of the partition."""
        listed = [one["name"] for one in (self.partition or {}).get("clients", ())]
        seen = [name for _, name in (*self.answers, *self.left_out)]
        return list(dict.fromkeys([*listed, *seen]))


def read_run(folder: RunFolder) -> RunData:
    """Raises R402 for what is no run's folder."""
    config = folder.read_json("config.json")
    parts: dict[str, Any] = {"rounds": {}, "answers": {}, "left_out": {}, "scores": {}}
    started, notes = None, []
    for event in read_events(folder):
        match event.get("event"):
            case "RunStarted":
                started = event
            case "RoundDone":
                parts["rounds"][event["round"]] = event
            case "ClientDone":
                parts["answers"][event["round"], event["name"]] = event
            case "ClientLeftOut":
                parts["left_out"][event["round"], event["name"]] = event
            case "Scored":
                parts["scores"].setdefault(event["phase"], {})[event["round"]] = event
            case "Noted":
                notes.append(str(event["text"]))
    parts["rounds"] = dict(sorted(parts["rounds"].items()))
    return RunData(
        folder.path.resolve().name,
        config,
        read_if_there(folder, "result.json"),
        read_if_there(folder, DATA),
        read_if_there(folder, EXPERTS),
        started,
        notes=tuple(dict.fromkeys(notes)),
        effects=read_if_there(folder, EFFECTS),
        epsilon=epsilon_by_round(folder),
        **parts,
    )


def read_if_there(folder: RunFolder, name: str) -> Record | None:
    """A table of the run, None where there is none, or none yet."""
    if (folder.path / name).exists():
        with contextlib.suppress(FedtuneError):
            return folder.read_json(name)
    return None


def read_events(folder: RunFolder) -> Iterator[Record]:
    """Whole lines of events.jsonl; a run that is being written, or was killed, may end in half a line."""
    path = folder.path / "events.jsonl"
    if not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            with contextlib.suppress(ValueError):
                record = json.loads(line)
                if isinstance(record, dict):
                    yield record

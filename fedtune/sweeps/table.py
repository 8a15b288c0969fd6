"""What came out of a sweep: a row a trial, the mean over its seeds and their spread."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fedtune.runtime.alone import FALLING
from fedtune.sweeps.plan import Trial
from fedtune.sweeps.runner import Outcome

COLUMNS = (  # of every row, behind the settings
    "seeds",
    "rounds",
    "score",
    "score_std",
    "test",
    "test_std",
    "test_min",
    "test_max",
    "up_bytes_per_client_round",
    "seconds",
    "failed",
)


@dataclass
class Row:
    """A trial and what its runs have said so far, by seed."""

    trial: Trial
    outcomes: dict[int, Outcome] = field(default_factory=dict)

    @property
    def results(self) -> list[dict[str, Any]]:
        return [one.result for _, one in sorted(self.outcomes.items()) if one.result]

    @property
    def scores(self) -> list[float]:
        """By which trials are compared: the best round's on rows that clients hold out (without such rows: on
        the test set)."""
        said = [(one.get("best") or {}).get("value", one.get("federated")) for one in self.results]
        return [float(value) for value in said if value is not None]

    @property
    def metric(self) -> str:
        return next((str(one["metric"]) for one in self.results), "")

    @property
    def worth(self) -> float:
        """The mean score as a number that rises; minus infinity where a run has failed or there is none."""
        scores = self.scores
        if not scores or len(scores) < len(self.outcomes) or not all(map(math.isfinite, scores)):
            return -math.inf
        mean = statistics.fmean(scores)
        return -mean if self.metric in FALLING else mean

    @property
    def errors(self) -> list[str]:
        return [one.error for _, one in sorted(self.outcomes.items()) if one.error]

    def values(self) -> dict[str, Any]:
        """The row's columns."""
        test = [float(one["federated"]) for one in self.results if one.get("federated") is not None]
        rounds = [one["rounds"] for one in self.results]
        up = [one["up_bytes_per_client_round"] for one in self.results]
        figures = (
            len(self.results), max(rounds, default=0), mean(self.scores), spread(self.scores), mean(test),
            spread(test), min(test, default=None), max(test, default=None), mean(up),
            mean([one["seconds"] for one in self.results]), self.errors[0] if self.errors else "",
        )  # fmt: skip
        return {**self.trial.settings, **dict(zip(COLUMNS, figures, strict=True))}


def mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def spread(values: Sequence[float]) -> float | None:
    """Standard deviation of a sample; None of fewer than two."""
    return statistics.stdev(values) if len(values) > 1 else None


def ranked(rows: Sequence[Row]) -> list[Row]:
    """The best first: those that came furthest, by their score; of equals, the one tried first."""
    reached = {id(row): max((one["rounds"] for one in row.results), default=0) for row in rows}
    return sorted(rows, key=lambda row: (-reached[id(row)], -row.worth, row.trial.number))


def as_csv(rows: Sequence[Row]) -> str:
    found = [row.values() for row in rows]
    names = [name for name in dict.fromkeys(name for one in found for name in one) if name not in COLUMNS]
    text = io.StringIO()
    writer = csv.DictWriter(text, [*names, *COLUMNS], lineterminator="\n")
    writer.writeheader()
    writer.writerows(found)
    return text.getvalue()


def as_text(rows: Sequence[Row]) -> list[str]:
    """Columns that people look at: settings, the mean and its spread, bytes and seconds."""
    metric = next((row.metric for row in rows if row.metric), "score")
    settings = list(dict.fromkeys(path for row in rows for path in row.trial.settings))
    lines = [[*settings, "seeds", "rounds", f"{metric} (held out)", f"{metric} (test)", "KiB up", "seconds"]]
    for row in rows:
        said = row.values()
        if not row.results:
            lines.append([*(str(said.get(path, "")) for path in settings), "0", *([""] * 5)])
            continue
        lines.append(
            [
                *(str(said.get(path, "")) for path in settings),
                str(said["seeds"]),
                str(said["rounds"]),
                around(said["score"], said["score_std"]),
                around(said["test"], said["test_std"]),
                f"{said['up_bytes_per_client_round'] / 1024:,.1f}",
                f"{said['seconds']:,.1f}",
            ]
        )
    wide = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    told = ["  ".join(t.ljust(width) for t, width in zip(line, wide, strict=True)).rstrip() for line in lines]
    return told + [f"failed: {row.trial.settings}: {row.errors[0]}" for row in rows if row.errors]


def around(value: float | None, deviation: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" + (f" ± {deviation:.4f}" if deviation is not None else "")

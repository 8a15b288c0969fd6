"""A run in words: what was gained, by what, and at which cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedtune.report.chart import brief, number
from fedtune.report.curves import DOWN
from fedtune.report.read import RunData
from fedtune.sinks.console import size
from fedtune.sinks.standing import duration


def headline(run: RunData) -> list[str]:
    """Sentences."""
    return [text for text in (gained(run), compared(run), by_what(run), cost(run), privacy(run)) if text]


def gained(run: RunData) -> str:
    if run.result is None:
        rounds, wanted = max(run.rounds, default=0), run.config.get("rounds", "?")
        return f"This run is not finished: {rounds} of {wanted} rounds are committed."
    after, before = run.federated, run.lines.get("base model")
    if after is None:
        return "Nothing was scored: there were no rows to score on."
    if before is None:
        return f"The federated model has {run.metric} {number(after)} on the test set."
    verb = "rose" if after > before else "fell" if after < before else "stayed"
    word = "" if run.metric not in DOWN else ", where less is better"
    return f"{run.metric.capitalize()} {verb} from {number(before)} (base model) to {number(after)}{word}."


def compared(run: RunData) -> str:
    """Against clients by themselves, and against all rows in one place."""
    if run.federated is None:
        return ""
    parts = []
    for name, text in (
        ("local only", "clients by themselves"),
        ("centralised", "training on all rows in one place"),
    ):
        other = run.lines.get(name)
        if other is not None:
            apart = run.federated - other
            than = (
                f"{number(abs(apart), 2)} {'more' if apart > 0 else 'less'} than" if apart else "as much as"
            )
            parts.append(f"{than} {text} ({number(other)})")
    return f"That is {' and '.join(parts)}." if parts else ""


def by_what(run: RunData) -> str:
    method = run.config.get("method") or {}
    adapter = method.get("adapter") or {}
    kind = adapter.get("kind", "")
    rank = f" of rank {adapter['rank']}" if isinstance(adapter.get("rank"), int) else ""
    steps = [str(one.get("step")) for one in run.config.get("chain") or ()]
    rule = (run.config.get("aggregate") or {}).get("rule", "mean")
    result, started = run.result or {}, run.started or {}
    trainable, total = (result.get(key) or started.get(key) for key in ("trainable", "total"))
    share = f", {trainable:,} of {total:,} parameters" if trainable and total else ""
    chain = f", sent through {', '.join(steps)}" if steps else ""
    model = brief(str((run.config.get("model") or {}).get("name", "")).rstrip("/").rpartition("/")[2])
    what = " / ".join(part for part in (str(method.get("type", "")), kind) if part)
    return f"By {what}{rank} on {model}{share}, combined by {rule}{chain}." if what else ""


def cost(run: RunData) -> str:
    result = run.result
    if result is None:
        return ""
    out = result.get("left_out")
    missing = f"; {out} answers did not count" if out else ""
    return (
        f"At the cost of {result['rounds']} rounds with {result['clients']} clients, "
        f"{size(result['up_bytes_per_client_round'])} up and {size(result['down_bytes_per_client_round'])} "
        f"down for each client and round, and {duration(result['seconds'])} in all{missing}."
    )


def privacy(run: RunData) -> str:
    """What the result says of privacy spent."""
    result = run.result or {}
    if said := sentences(result):
        return f"Privacy: {said[0]}."
    if result.get("epsilon") is not None:
        return f"Differential privacy: epsilon = {number(float(result['epsilon']))}."
    return "" if run.result is None else "No differential privacy: nothing bounds what an update reveals."


def sentences(result: Mapping[str, Any]) -> list[str]:
    """One for each unit that is hidden."""
    return [str(one) for one in result.get("privacy") or ()]


def title(runs: Sequence[RunData]) -> str:
    return brief(runs[0].name, 60) if len(runs) == 1 else f"{len(runs)} runs side by side"


def privacy_rows(run: RunData) -> list[list[str]]:
    """Everything that the result says of privacy, as name and value."""
    result = run.result or {}
    epsilon = [["epsilon", number(result["epsilon"])]] if result.get("epsilon") is not None else []
    return epsilon + [["spent", one] for one in sentences(result)]

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


def figures(run: RunData) -> list[tuple[str, str, str]]:
    """What is read first, one beside the other: name, value, and what is said below it."""
    result = run.result
    if result is None:
        return so_far(run)
    found = []
    if run.federated is not None:
        found.append((f"{run.metric}, federated", number(run.federated, 3), "on the test set"))
    found += [(name, number(value, 3), "") for name, value in run.lines.items()]
    up, down = (size(result[f"{way}_bytes_per_client_round"]) for way in ("up", "down"))
    of = f"{result['rounds']} rounds, {result['clients']} clients"
    return [
        *found,
        ("up, client and round", up, f"down {down}"),
        ("time", duration(result["seconds"]), of),
    ]


def so_far(run: RunData) -> list[tuple[str, str, str]]:
    """The same of a run that goes on, or was cut short."""
    rounds, wanted = max(run.rounds, default=0), run.config.get("rounds", "?")
    found = [("rounds", f"{rounds} of {wanted}", "")]
    if scored := run.quality():
        last, value = scored[-1]
        found.append((run.metric, number(value, 3), f"held-out rows, round {last}"))
    if losses := run.curve("loss"):
        found.append(("training loss", number(losses[-1][1], 3), f"{number(losses[0][1], 3)} at first"))
    if traffic := run.traffic():
        found.append(("bytes so far", size(traffic[rounds]), "up and down, all clients"))
    return found


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


def what(run: RunData) -> str:
    """Method, adapter, rank and model; "" where the recipe is not known."""
    method = run.config.get("method") or {}
    adapter = method.get("adapter") or {}
    rank = f" of rank {adapter['rank']}" if isinstance(adapter.get("rank"), int) else ""
    named = " / ".join(str(part) for part in (method.get("type"), adapter.get("kind")) if part)
    return f"{named}{rank} on {model_name(run)}" if named else ""


def model_name(run: RunData) -> str:
    """The last part of a path or a hub's name; of a model in a package, the package."""
    name = str((run.config.get("model") or {}).get("name", "")).rstrip("/")
    if name.startswith("package:"):
        return brief(name.removeprefix("package:").partition("/")[0])
    return brief(name.rpartition("/")[2])


def chain(run: RunData) -> str:
    """The names of its steps."""
    return ", ".join(str(one.get("step")) for one in run.config.get("chain") or ())


def by_what(run: RunData) -> str:
    rule = (run.config.get("aggregate") or {}).get("rule", "mean")
    result, started = run.result or {}, run.started or {}
    trainable, total = (result.get(key) or started.get(key) for key in ("trainable", "total"))
    share = f", {trainable:,} of {total:,} parameters" if trainable and total else ""
    through = f", sent through {steps}" if (steps := chain(run)) else ""
    named = what(run)
    return f"By {named}{share}, combined by {rule}{through}." if named else ""


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

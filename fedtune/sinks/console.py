"""What a person sees while a run goes on: a line a round, and a table at the end."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from fedtune.events import (
    Alarm,
    Chose,
    ClientLeftOut,
    Event,
    Noted,
    RoundDone,
    RunDone,
    RunStarted,
    Said,
    Scored,
    Shortened,
    Truncated,
    Waiting,
)
from fedtune.plain import plain


def console_sink(event: Event) -> None:
    """Print the events that a person wants to see; everything is in events.jsonl."""
    text = line(event)
    if text:
        print(shown(event, text), file=sys.stdout, flush=True)


def shown(event: Event, text: str) -> str:
    """Whatever came from elsewhere in it, as a terminal may have it; the table at the end has lines."""
    return "\n".join(map(plain, text.split("\n"))) if isinstance(event, RunDone) else plain(text)


def line(event: Event) -> str:
    """One event as text, or nothing."""
    match event:
        case RunStarted():
            share = (
                f"{event.trainable:,} of {event.total:,} parameters "
                f"({100 * event.trainable / event.total:.2f} %)"
            )
            threads = f"; {event.threads}" if event.threads else ""
            again = f", going on after round {event.resumed_after}" if event.resumed_after else ""
            return (
                f"{event.folder}: {event.clients} clients, {event.rounds} rounds{again}; trained: "
                f"{share}{threads}"
            )
        case Waiting():
            return f"... {event.text}"
        case Said():
            return event.text
        case Noted():
            return f"note: {event.text}"
        case Truncated() if event.whose.startswith("the "):
            left_out = f", {event.left_out} left out" if event.left_out else ""
            return (
                f"note: {event.cut} of {event.rows} texts of {event.whose} were cut to {event.max_length} "
                f"tokens{left_out}; events.jsonl has every client's"
            )
        case Chose() if event.round == 1:
            return f"client {event.name}: {event.text}"
        case ClientLeftOut():
            return f"round {event.round}: client {event.name} left out. {event.text}"
        case Shortened():
            return (
                f"round {event.round}: client {event.name} moves the state by {event.norm:.4g}, shortened to "
                f"{event.limit:.4g}"
            )
        case Alarm():
            return f"ALARM after round {event.round}: {event.text}"
        case RoundDone():
            known = event.metrics.get("loss")
            loss = "" if known is None else f"  loss {known:.4f}"
            answered = f"{event.members - event.left_out} of {event.members} clients"
            return (
                f"round {event.round:>3}  {answered}{loss}  up {size(event.up_bytes)}  down "
                f"{size(event.down_bytes)}  {event.seconds:.1f} s"
            )
        case Scored() if not event.phase.startswith("local:"):
            return f"{event.phase}: {event.metric} {event.value:.4f}" + (
                f" after round {event.round}" if event.round else ""
            )
        case RunDone():
            return table(event.result)
    return ""


def table(result: Mapping[str, Any]) -> str:
    """The final table of a run."""
    metric = result["metric"]
    rows = [
        (name, result.get(key))
        for name, key in (
            ("base model", "base"),
            ("local only (mean over clients)", "local"),
            (kept_name(result), "federated"),
            ("federated, last round", "federated_last"),
            ("centralised", "centralised"),
        )
    ]
    out = [
        "",
        f"{'':<34}{metric or 'nothing was scored: no rows here (deploy.test) or held out at the sites'}",
    ]
    out += [f"{name:<34}{value:.4f}" for name, value in rows if value is not None]
    out += [
        f"{name:<34}{value:.4f}" for name, value in (result.get("also") or {}).items() if value is not None
    ]
    out += figure_lines(result.get("figures") or {})
    if each := result.get("per_client"):
        out.append(
            f"{'federated, client by client':<34}{each['mean']:.4f} mean of {each['clients']} on their own "
            f"held-out rows, worst {each['worst']:.4f} ({each['worst_client']}), spread {each['spread']:.4f}"
        )
    out += [
        *legend(result),
        "",
        f"{'bytes per client and round':<34}up {size(result['up_bytes_per_client_round'])}, down "
        f"{size(result['down_bytes_per_client_round'])}",
        f"{'seconds':<34}{result['seconds']:.1f} (first round after {result['first_round_seconds']:.1f})",
        f"{'adapter':<34}{result['adapter']}",
        *(f"{'privacy':<34}{said}" for said in result.get("privacy") or ()),
    ]
    for number, sample in enumerate(result.get("samples") or (), 1):
        out += sample_lines(number, sample)
    return "\n".join(out)


def sample_lines(number: int, sample: Mapping[str, str]) -> list[str]:
    """A question of the test set, and its answers before and after training, a line each."""
    shown = {"wanted": "wanted", "base": "base model", "federated": "federated"}
    lines = [f"{name:<12}{short(sample[key])}" for key, name in shown.items() if key in sample]
    return ["", f"question {number:<3}{short(sample['asked'], from_end=True)}", *lines]


def short(text: str, most: int = 150, *, from_end: bool = False) -> str:
    """
    >>> short("one  two\\nthree"), short("abcdef", 4), short("abcdef", 4, from_end=True)
    ('one two three', 'abc…', '…def')
    """
    line = " ".join(text.split())
    if len(line) <= most:
        return line
    return f"…{line[1 - most :]}" if from_end else f"{line[: most - 1]}…"


def figure_lines(figures: Mapping[str, Mapping[str, float]]) -> list[str]:
    """The metrics beside the first one, of the federated model and of the base; with their intervals."""
    own, base = figures.get("federated", {}), figures.get("base", {})
    out = []
    for name, value in own.items():
        if name.endswith(("_low", "_high")) or name == "rows":
            continue
        low, high = own.get(f"{name}_low"), own.get(f"{name}_high")
        between = f" ({low:.4f} to {high:.4f} at 95 %)" if low is not None and high is not None else ""
        before = f", base model {base[name]:.4f}" if name in base else ""
        out.append(f"{'federated: ' + name.replace('_', ' '):<34}{value:.4f}{between}{before}")
    return out


def kept_name(result: Mapping[str, Any]) -> str:
    """Which round's model is meant, where a round was chosen."""
    return f"federated (round {result['kept_round']}, best)" if result.get("best") else "federated"


def legend(result: Mapping[str, Any]) -> list[str]:
    """A line that says what the rows of comparisons are."""
    said = {
        "local": "local only: each client by itself, for its own steps",
        "centralised": "centralised: all rows in one place, for as many examples as the federation",
    }
    shown = [text for key, text in said.items() if result.get(key) is not None]
    return [f"({'; '.join(shown)})"] if shown else []


def size(count: float) -> str:
    """Bytes for people: 1 KiB = 1024 bytes."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return ""

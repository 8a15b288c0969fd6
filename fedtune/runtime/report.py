"""report.html: a run on one page, without scripts or anything from elsewhere."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable
from typing import Any

from fedtune.disk import write_atomic
from fedtune.plain import plain
from fedtune.runtime.folder import RunFolder
from fedtune.sinks.console import kept_name, size

WIDTH, HEIGHT, MARGIN = 640, 220, 40  # of a curve, in pixels
STYLE = (
    "body{font:16px/1.5 system-ui;max-width:52rem;margin:2rem auto;padding:0 1rem}"
    "td,th{padding:.2rem .8rem;text-align:right}th:first-child,td:first-child{text-align:left}"
)


def write_report(folder: RunFolder) -> str:
    """Write report.html from config.json, events.jsonl and, where the run is finished, result.json; returns
    its path."""
    config = folder.read_json("config.json")
    events = list(read_events(folder))
    result = folder.read_json("result.json") if (folder.path / "result.json").exists() else None
    target = folder.path / "report.html"
    write_atomic(target, page(folder.path.name, config, events, result).encode())
    return str(target)


def read_events(folder: RunFolder) -> Iterable[dict[str, Any]]:
    """Whole lines of events.jsonl; a run that is being written, or was killed, may end in half a line."""
    path = folder.path / "events.jsonl"
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            yield json.loads(line)
        except ValueError:
            continue


def page(
    name: str, config: dict[str, Any], events: list[dict[str, Any]], result: dict[str, Any] | None
) -> str:
    rounds = {
        e["round"]: e for e in events if e["event"] == "RoundDone"
    }  # a resumed run may have told a round twice
    curve = [(n, e["metrics"]["loss"]) for n, e in sorted(rounds.items()) if "loss" in e["metrics"]]
    left_out = [e for e in events if e["event"] == "ClientLeftOut"]
    parts = [f"<h1>{html.escape(name)}</h1>"]
    if result:
        scores = [
            (label, result[key])
            for label, key in (
                ("base model", "base"),
                ("local only", "local"),
                (kept_name(result), "federated"),
                ("federated, last round", "federated_last"),
                ("centralised", "centralised"),
            )
            if result.get(key) is not None
        ]
        parts.append(grid(["", result["metric"]], [[label, f"{value:.4f}"] for label, value in scores]))
        parts.append(
            f"<p>{size(result['up_bytes_per_client_round'])} up and "
            f"{size(result['down_bytes_per_client_round'])} down per client and round; "
            f"{result['rounds']} rounds, {result['clients']} clients, {result['seconds']:.1f} s; state "
            f"<code>{result['state_sha256'][:16]}</code></p>"
        )
        parts += own_rows(result)
    else:
        parts.append("<p>This run is not finished.</p>")
    parts += ["<h2>Training loss by round</h2>", plot(curve)] if len(curve) > 1 else []
    table = [
        [
            str(n),
            f"{e['members'] - e['left_out']} of {e['members']}",
            size(e["up_bytes"]),
            size(e["down_bytes"]),
            f"{e['seconds']:.1f}",
        ]
        for n, e in sorted(rounds.items())
    ]
    parts += ["<h2>Rounds</h2>", grid(["round", "clients", "up", "down", "seconds"], table)]
    if left_out:
        parts += [
            "<h2>Left out</h2>",
            grid(["round", "client", "why"], [[str(e["round"]), e["name"], e["text"]] for e in left_out]),
        ]
    parts += ["<h2>Recipe</h2>", f"<pre>{html.escape(json.dumps(config, indent=2))}</pre>"]
    return (
        "<!doctype html><html lang=en><meta "
        f"charset=utf-8><title>{html.escape(name)}</title><style>{STYLE}</style>"
        + "".join(parts)
        + "</html>\n"
    )


def own_rows(result: dict[str, Any]) -> list[str]:
    """Every client's score on its own held-out rows."""
    own = {name: one for name, one in result["phases"].get("clients_metric", {}).items() if one}
    if not own:
        return []
    each = result["per_client"]
    table = [[name, f"{one['metric']:.4f}", str(one["count"])] for name, one in own.items()]
    return [
        "<h2>Client by client</h2>",
        f"<p>On its own held-out rows: mean {each['mean']:.4f}, worst {each['worst']:.4f} "
        f"({html.escape(plain(each['worst_client']))}), spread {each['spread']:.4f}</p>",
        grid(["client", result["metric"], "rows"], table),
    ]


def grid(head: list[str], rows: list[list[str]]) -> str:
    """An HTML table; every cell is escaped."""
    cells = [
        "<tr>" + "".join(f"<td>{html.escape(plain(cell))}</td>" for cell in row) + "</tr>" for row in rows
    ]
    return (
        "<table><tr>"
        + "".join(f"<th>{html.escape(plain(cell))}</th>" for cell in head)
        + "</tr>"
        + "".join(cells)
        + "</table>"
    )


def plot(points: list[tuple[int, float]]) -> str:
    """A line as SVG."""
    low, high = min(y for _, y in points), max(y for _, y in points)
    first, last = points[0][0], points[-1][0]

    def at(x: int, y: float) -> str:
        across = MARGIN + (WIDTH - 2 * MARGIN) * (x - first) / (last - first)
        down = HEIGHT - MARGIN - (HEIGHT - 2 * MARGIN) * (y - low) / ((high - low) or 1.0)
        return f"{across:.1f},{down:.1f}"

    line = " ".join(at(x, y) for x, y in points)
    labels = (
        f"<text x=0 y={MARGIN} font-size=12>{high:.3f}</text><text x=0 y={HEIGHT - MARGIN} "
        f"font-size=12>{low:.3f}</text>"
    )
    curve = f"<polyline points='{line}' fill=none stroke=currentColor stroke-width=2 />"
    return f"<svg width={WIDTH} height={HEIGHT} role=img aria-label='training loss'>{curve}{labels}</svg>"

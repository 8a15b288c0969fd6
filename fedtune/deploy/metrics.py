"""A Prometheus endpoint (text format 0.0.4): what an operator watches, from the exchange. Counts only, no
names of sites."""

from __future__ import annotations

import shutil
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

from fedtune.deploy.small_server import SmallServer
from fedtune.errors import FedtuneError
from fedtune.events import Event, Sink
from fedtune.exchange import Server
from fedtune.exchange.events import CallRefused

AT_ONCE, SECONDS = 16, 10.0  # connections to the endpoint, and how long each may take
AGAIN = 60.0  # seconds in which the same refusal of the same member is told once


class Refusals:
    """A sink that counts refused calls by code, and passes the first of each kind on: refusals cost whoever
    asks for them nothing."""

    def __init__(self, sink: Sink) -> None:
        self.sink, self.by_code, self._lock = sink, Counter[str](), threading.Lock()
        self._told: dict[tuple[str, str, str], float] = {}

    def __call__(self, event: Event) -> None:
        if isinstance(event, CallRefused):
            with self._lock:  # calls come from many threads
                self.by_code[event.code] += 1
                about = (event.peer, event.code, event.call)
                if event.at < self._told.get(about, 0.0) + AGAIN:
                    return
                self._told = {other: at for other, at in self._told.items() if at > event.at - AGAIN} | {
                    about: event.at
                }
        self.sink(event)


def lines(server: Server, home: Path, refusals: Refusals) -> Iterator[str]:
    """One sample a line."""
    newest: dict[str, Any] = {}
    for progress in server.service.server_store.progress():
        newest.setdefault(progress.run, progress)
    for name, about, field in (
        ("fedtune_round", "round that is being asked about", "round"),
        ("fedtune_round_asked", "members asked in it", "asked"),
        ("fedtune_round_accepted", "updates accepted in it", "accepted"),
        ("fedtune_round_bytes", "bytes of those updates", "bytes"),
    ):
        yield from metric(
            name,
            about,
            "gauge",
            {f'{{run="{run}"}}': getattr(progress, field) for run, progress in sorted(newest.items())},
        )
    yield from metric(
        "fedtune_members_present",
        "members that have called within a minute",
        "gauge",
        {"": len(server.door.present())},
    )
    yield from metric(
        "fedtune_uploads", "uploads under way", "gauge", {"": len(server.service.uploads.active)}
    )
    yield from metric(
        "fedtune_disk_free_bytes",
        "free bytes of the disk that holds updates",
        "gauge",
        {"": shutil.disk_usage(home).free},
    )
    refused = {f'{{code="{code}"}}': count for code, count in sorted(refusals.by_code.items())}
    yield from metric(
        "fedtune_refused_total",
        "calls that were refused since the gateway started, by code",
        "counter",
        refused,
    )


def metric(name: str, about: str, kind: str, samples: Mapping[str, int]) -> Iterator[str]:
    yield f"# HELP {name} {about}"
    yield f"# TYPE {name} {kind}"
    yield from (f"{name}{labels} {value}" for labels, value in samples.items())


def serve_metrics(address: str, server: Server, home: Path, refusals: Refusals) -> SmallServer:
    """Answer GET /metrics in a thread. Raises E801."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path != "/metrics":
                self.send_error(404)
                return
            body = ("\n".join(lines(server, home, refusals)) + "\n").encode()
            self.send_response(200)
            self.send_header("content-type", "text/plain; version=0.0.4")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *arguments: Any) -> None:
            """Nothing."""

    host, _, port = address.rpartition(":")
    try:
        http = SmallServer((host, int(port)), Handler, AT_ONCE, SECONDS)
    except (OSError, ValueError) as error:
        raise FedtuneError(
            "E801", f"metrics address '{address}' ({error})", "a free HOST:PORT", "choose another --metrics"
        ) from None
    threading.Thread(target=http.serve_forever, daemon=True).start()
    return http

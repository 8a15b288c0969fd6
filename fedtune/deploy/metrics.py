"""A Prometheus endpoint (text format 0.0.4): what an operator watches, from the exchange's book. Counts only, no names of sites."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from fedtune.errors import FedtuneError
from fedtune.exchange import Desk


def lines(desk: Desk, home: Path) -> Iterator[str]:
    """One sample a line."""
    newest: dict[str, Any] = {}
    for progress in desk.progress():
        newest.setdefault(progress.run, progress)
    gauges = {
        "fedtune_round": ("round that is being asked about", "round"),
        "fedtune_round_asked": ("members asked in it", "asked"),
        "fedtune_round_accepted": ("updates accepted in it", "accepted"),
        "fedtune_round_bytes": ("bytes of those updates", "bytes"),
    }
    for name, (about, field) in gauges.items():
        yield f"# HELP {name} {about}"
        yield f"# TYPE {name} gauge"
        yield from (f'{name}{{run="{run}"}} {getattr(progress, field)}' for run, progress in sorted(newest.items()))
    yield "# HELP fedtune_disk_free_bytes free bytes of the disk that holds updates"
    yield "# TYPE fedtune_disk_free_bytes gauge"
    yield f"fedtune_disk_free_bytes {shutil.disk_usage(home).free}"


def serve_metrics(address: str, desk: Desk, home: Path) -> ThreadingHTTPServer:
    """Answer GET /metrics in a thread. Raises E801."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path != "/metrics":
                self.send_error(404)
                return
            body = ("\n".join(lines(desk, home)) + "\n").encode()
            self.send_response(200)
            self.send_header("content-type", "text/plain; version=0.0.4")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *arguments: Any) -> None:
            """Nothing."""

    host, _, port = address.rpartition(":")
    try:
        server = ThreadingHTTPServer((host, int(port)), Handler)
    except (OSError, ValueError) as error:
        raise FedtuneError("E801", f"metrics address '{address}' ({error})", "host:port that is free", "choose another") from None
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server

"""The web server: loopback only, GET only, and nothing without the token in the address.

A page of somebody else's that is open in the same browser cannot read anything here: it does not know the
token, and a name of its own that it lets point to this machine is not the host that is asked for (DNS
rebinding). No part of an address becomes a path; connections, their time and their number are bounded.
"""

from __future__ import annotations

import hmac
import secrets
import threading
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

MOST = 16  # connections at once
PATIENCE = 10.0  # seconds for a request to arrive
HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}


@dataclass(frozen=True)
class Answer:
    body: str
    kind: str = "text/html"


Pages = Callable[[list[str]], Answer | None]  # the address behind the token, in parts -> what is there


class Server(ThreadingHTTPServer):
    """Serves `pages` at `address` until it is shut down; port 0 is a free one."""

    daemon_threads = True

    def __init__(self, pages: Pages, port: int = 0, token: str = "") -> None:
        self.pages, self.token = pages, token or secrets.token_urlsafe(24)
        self.room = threading.BoundedSemaphore(MOST)
        super().__init__(("127.0.0.1", port), Handler)

    @property
    def hosts(self) -> tuple[str, str]:
        return f"127.0.0.1:{self.server_port}", f"localhost:{self.server_port}"

    @property
    def address(self) -> str:
        return f"http://{self.hosts[0]}/{self.token}/"

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self.room.acquire(blocking=False):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:
            self.room.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.room.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that has gone is no news."""


class Handler(BaseHTTPRequestHandler):
    server: Server
    server_version, sys_version = "fedtune", ""
    timeout = PATIENCE

    def do_GET(self) -> None:
        if self.headers.get("Host") not in self.server.hosts:
            self.refuse(403, "another host is asked for")
            return
        token, *parts = self.path.partition("?")[0].lstrip("/").split("/")
        if not hmac.compare_digest(token.encode(), self.server.token.encode()):
            self.refuse(404, "nothing here; the address that fedtune ui prints has a token")
            return
        answer = self.server.pages([part for part in parts if part])
        if answer is None:
            self.refuse(404, "no such page")
            return
        self.say(200, answer.body, answer.kind)

    def refuse(self, status: int, why: str) -> None:
        self.close_connection = True
        self.say(status, why + "\n", "text/plain")

    def say(self, status: int, text: str, kind: str) -> None:
        body = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        for name, value in HEADERS.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Requests hold the token: they are written nowhere."""

"""An HTTP server for a few callers of one machine or an inner network: so many connections at once, and,
where it answers single questions, so many seconds for each, however slowly its bytes come."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class SmallServer(ThreadingHTTPServer):
    """most      connections at once; one more is closed as soon as it is there
    seconds   after which a connection is closed, whatever it does; 0: it may stay
    """

    daemon_threads = True

    def __init__(
        self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler], most: int, seconds: float = 0.0
    ) -> None:
        self.most, self.seconds, self._lock = most, seconds, threading.Lock()
        self._open: dict[socket.socket, float] = {}
        super().__init__(address, handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._lock:
            room = len(self._open) < self.most
            if room:
                self._open[request] = time.monotonic()
        if room:
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def shutdown_request(self, request: Any) -> None:
        with self._lock:
            self._open.pop(request, None)
        super().shutdown_request(request)

    def service_actions(self) -> None:
        """Between two looks for new connections, twice a second."""
        if not self.seconds:
            return
        with self._lock:
            late = [one for one, began in self._open.items() if time.monotonic() > began + self.seconds]
        for one in late:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Nothing: a caller that hung up, and will ask again."""

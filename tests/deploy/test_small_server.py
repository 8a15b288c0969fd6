"""An HTTP server for a few callers: so many connections, so many seconds each."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler

from fedtune.deploy.small_server import SmallServer
from tests.waiting import PATIENCE, wait_for


class Echo(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("content-length", "2")
        self.end_headers()
        self.wfile.write(b"ok")

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@contextmanager
def serving(most: int, seconds: float = 0.0) -> Iterator[SmallServer]:
    server = SmallServer(("127.0.0.1", 0), Echo, most, seconds)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join(PATIENCE)


def dial(server: SmallServer) -> socket.socket:
    return socket.create_connection(server.server_address[:2], PATIENCE)


def test_one_connection_more_is_closed_at_once_and_the_others_are_answered() -> None:
    with serving(2) as server, dial(server) as first, dial(server) as second:
        wait_for(lambda: len(server._open) == 2, "two connections")
        with dial(server) as third:
            assert third.recv(1) == b""
        for one in (first, second):
            one.sendall(b"GET / HTTP/1.0\r\n\r\n")
            assert one.makefile("rb").read().endswith(b"ok")
        wait_for(lambda: not server._open, "room")
        with dial(server) as fourth:
            fourth.sendall(b"GET / HTTP/1.0\r\n\r\n")
            assert fourth.makefile("rb").read().startswith(b"HTTP/1.0 200")


def test_a_connection_has_so_many_seconds_however_slowly_its_bytes_come() -> None:
    with serving(2, 0.2) as server, dial(server) as slow:
        slow.sendall(b"GET")
        assert slow.recv(1) == b""
    with serving(2) as server, dial(server) as slow:
        wait_for(lambda: len(server._open) == 1, "a connection")
        server._open = dict.fromkeys(server._open, -1e9)
        server.service_actions()  # nothing bounds it
        slow.sendall(b"GET / HTTP/1.0\r\n\r\n")
        assert slow.makefile("rb").read().endswith(b"ok")
    assert server.daemon_threads and (server.most, server.seconds) == (2, 0.0)

"""Flower's fleet API through the exchange's door: the SuperNode speaks to a port of its own machine, the SuperLink stays on its own.

Flower's own service has no mutual TLS, and whoever reaches its port may start code on every node: it is never open to the network
here, and of what members may send to it only the fleet API passes.
"""

from __future__ import annotations

import contextlib
import http.client
import re
import threading
import time
from collections.abc import Callable, Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import grpc

from fedtune.errors import FedtuneError, Refused
from fedtune.exchange.tls import Door, secure_channel
from fedtune.trust import Identity
from fedtune.wire.v1 import fleet_pb2 as pb

NAME = "fedtune.wire.v1.Fleet"
PREFIX = "/v1/fleet/"
PATH = re.compile(r"/v1/fleet/[a-z0-9-]+")  # as Flower's client writes them; no dots, no percent signs, no query
HEARTBEAT = "/v1/fleet/send-node-heartbeat"
METHODS = frozenset({"POST", "GET"})
LONGEST = 8 << 20  # bytes of an answer: Flower cuts its objects at 5 MB
UP = 256 << 10  # bytes of a request
SECONDS = 30.0
ENDED = "fedtune-ended"  # a header of ours in every answer: a run of the member's that has ended, how, and nothing for Flower
OWN = frozenset({"host", "connection", "content-length", "transfer-encoding", "keep-alive", "expect", "date", "server"})  # of one connection


def behind(superlink: str, ended: Callable[[str], Iterable[str]] = lambda member: ()) -> Callable[[Door], grpc.GenericRpcHandler]:
    """For `exchange.serve(..., also=[behind("127.0.0.1:8000")])`; `ended`: what there is to say to a member of the ends of its runs."""

    def made(door: Door) -> grpc.GenericRpcHandler:
        def call(request: pb.FleetRequest, context: Any) -> pb.FleetReply:
            if request.method not in METHODS or not PATH.fullmatch(request.path):
                raise FedtuneError("E806", f"{request.method[:8]} {request.path[:80]!r}", f"POST or GET under {PREFIX}", "use fedtune client")
            reply = forwarded(superlink, request)
            reply.headers.extend(pb.FleetHeader(name=ENDED, value=text) for text in ended(door.peer(context).name.name))
            return reply

        handler = grpc.unary_unary_rpc_method_handler(call, pb.FleetRequest.FromString, pb.FleetReply.SerializeToString)
        return grpc.method_handlers_generic_handler(NAME, {"Call": handler})

    return made


def forwarded(superlink: str, request: pb.FleetRequest) -> pb.FleetReply:
    """What the SuperLink answers; 503 where it is not there, which a SuperNode waits out."""
    host, _, port = superlink.rpartition(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=SECONDS)
    try:
        headers = {header.name: header.value for header in request.headers if header.name not in OWN}
        connection.request(request.method, request.path, request.body or None, headers)
        answer = connection.getresponse()
        body = answer.read(LONGEST + 1)
        if len(body) > LONGEST:
            raise Refused("W606", f"an answer of more than {LONGEST} bytes to {request.path}", "less", "send payloads over the exchange")
        kept = [pb.FleetHeader(name=name.lower(), value=value) for name, value in answer.getheaders() if name.lower() not in OWN]
        return pb.FleetReply(status=answer.status, headers=kept, body=body)
    except (OSError, http.client.HTTPException):
        return pb.FleetReply(status=503)
    finally:
        connection.close()


class Passage:
    """The site's end: an HTTP server on loopback. Whatever breaks on the way is a 503, and the SuperNode tries again."""

    def __init__(self, identity: Identity, coordinator: str, port: int = 0) -> None:
        self.channel = secure_channel(identity, coordinator, longest=LONGEST + (64 << 10))
        self._call = self.channel.unary_unary(f"/{NAME}/Call", pb.FleetRequest.SerializeToString, pb.FleetReply.FromString)
        self.server = ThreadingHTTPServer(("127.0.0.1", port), self._handler())
        self.server.daemon_threads = True
        self.server.handle_error = lambda request, client_address: None  # type: ignore[method-assign]  # a SuperNode that hung up, and will ask again
        self.address = f"127.0.0.1:{self.server.server_address[1]}"
        self.last: str = ""  # why the last call failed, "" where it did not
        self.called = self.answered = False  # whether any call was made, and any answered
        self.ended: list[str] = []  # what the coordinator said of runs that have ended, each once
        self.asked = time.monotonic()  # when the SuperNode was last heard of; its heart beats in a thread of its own and says nothing
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.channel.close()

    def pass_on(self, method: str, path: str, headers: list[tuple[str, str]], body: bytes) -> pb.FleetReply:
        kept = [pb.FleetHeader(name=name.lower(), value=value) for name, value in headers if name.lower() not in OWN]
        if path != HEARTBEAT:
            self.asked = time.monotonic()
        try:
            reply: pb.FleetReply = self._call(pb.FleetRequest(method=method, path=path, headers=kept, body=body), timeout=SECONDS)
        except grpc.RpcError as error:
            self.last, self.called = error.details() or str(error.code()), True
            return pb.FleetReply(status=503)
        self.ended += [header.value for header in reply.headers if header.name == ENDED and header.value not in self.ended]
        kept = [header for header in reply.headers if header.name != ENDED]
        self.last, self.called, self.answered = "", True, True
        return pb.FleetReply(status=reply.status, headers=kept, body=reply.body)

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        passage = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def do_POST(self) -> None:
                length = self.headers.get("content-length", "0")
                if not length.isdecimal() or int(length) > UP:
                    self.send_error(413)
                    return
                body = self.rfile.read(int(length))
                reply = passage.pass_on(self.command, self.path, list(self.headers.items()), body)
                with contextlib.suppress(ConnectionError):  # a SuperNode that did not wait for the answer asks again
                    self.send_response(reply.status)
                    for header in reply.headers:
                        self.send_header(header.name, header.value)
                    self.send_header("content-length", str(len(reply.body)))
                    self.end_headers()
                    self.wfile.write(reply.body)

            do_GET = do_POST

            def log_message(self, format: str, *arguments: Any) -> None:
                """Nothing: the SuperNode's log says what matters."""

        return Handler

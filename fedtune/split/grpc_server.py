"""The body service behind gRPC: its call, its options, and who may listen without certificates."""

from __future__ import annotations

import ipaddress
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc

from fedtune.errors import FedtuneError
from fedtune.split.frames import CALL, CHUNK, LONGEST
from fedtune.split.service import Service

# A default server ends connections whose client pings more often than every 5 minutes during a long step
# (ENHANCE_YOUR_CALM, too_many_pings).
KEEPALIVE = [
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 30_000),  # on a slow uplink a ping waits behind megabytes in the socket
    (
        "grpc.http2.ping_timeout_ms",
        30_000,
    ),  # the pings that measure bandwidth come first, and would be waited for a minute
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
]
OPTIONS = [
    *KEEPALIVE,
    (
        "grpc.http2.min_ping_interval_without_data_ms",
        5_000,
    ),  # its name in gRPC's C core is MIN_RECV_PING_INTERVAL_WITHOUT_DATA
    ("grpc.max_receive_message_length", LONGEST + CHUNK),
    ("grpc.max_send_message_length", LONGEST + CHUNK),
    ("grpc.so_reuseport", 0),
]


def serve(
    service: Service, address: str, credentials: grpc.ServerCredentials | None = None
) -> tuple[grpc.Server, int]:
    """Listen for clients; the server and its port. Without credentials only on this machine itself (S716).
    `service` must have been started."""
    if credentials is None and not local(address):
        raise FedtuneError(
            "S716",
            f"no certificate for {address}",
            "mutual TLS, or a loopback address",
            "run 'fedtune keys init', or listen on 127.0.0.1",
        )
    streams = service.terms.sessions + 8  # some for those who are told that there is no room
    server = grpc.server(
        ThreadPoolExecutor(streams, "split"), options=OPTIONS, maximum_concurrent_rpcs=streams
    )
    server.add_generic_rpc_handlers((handler(service),))
    port = (
        server.add_insecure_port(address)
        if credentials is None
        else server.add_secure_port(address, credentials)
    )
    server.start()
    return server, port


def handler(service: Service, name_of: Callable[[Any], str] | None = None) -> grpc.GenericRpcHandler:
    """The call of split.proto, for any gRPC server; each stream takes a thread of its pool. `name_of` a
    call's
    context is what `admit` is told; by default the common name in the client's certificate."""

    def train(requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        connection = service.connect((name_of or common_name)(context), context.cancel)
        context.add_callback(connection.close)

        def read() -> None:
            try:
                for data in requests:
                    connection.receive(data)
            except (
                Exception
            ):  # gRPC raises a bare Exception when the peer is gone; the stream is over either way
                pass
            connection.close()

        threading.Thread(target=read, daemon=True).start()
        return connection.outgoing()

    name, method = CALL.strip("/").split("/")
    # no deserializer: a message that cannot be parsed is answered by a frame
    return grpc.method_handlers_generic_handler(name, {method: grpc.stream_stream_rpc_method_handler(train)})


def local(address: str) -> bool:
    """Whether an address is this machine's own, HOST:PORT or a unix socket."""
    host = address.rsplit(":", 1)[0].strip("[]")
    if address.startswith("unix:") or host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def common_name(context: grpc.ServicerContext) -> str:
    """The common name in the client's certificate; "" without TLS."""
    return next(
        (name.decode(errors="replace") for name in context.auth_context().get("x509_common_name", ())), ""
    )

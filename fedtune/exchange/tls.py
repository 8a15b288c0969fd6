"""Mutual TLS of the exchange: who may connect, and the one door that every call goes through before a handler
sees it."""

from __future__ import annotations

import contextlib
import functools
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import grpc

from fedtune.errors import FedtuneError
from fedtune.events import Event
from fedtune.exchange.events import CallRefused
from fedtune.exchange.grpc_errors import NoRoom, abort
from fedtune.exchange.limits import FRAME, WINDOW
from fedtune.proxies import is_loopback
from fedtune.trust import AllowList, Identity, Peer, peer_from_tls

KEEPALIVE = (  # a peer that is gone without a word is noticed after 30 s
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
)
SERVER_OPTIONS = (
    *KEEPALIVE,
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
    ("grpc.max_metadata_size", 8192),
    ("grpc.http2.bdp_probe", 0),  # a window that grows by itself is memory that grows by itself
    ("grpc.http2.lookahead_bytes", WINDOW),
    ("grpc.experimental.tcp_max_read_chunk_size", 1 << 16),  # of each connection; 4 MiB by default
    (
        "grpc.server_handshake_timeout_ms",
        10_000,
    ),  # who connects and says nothing keeps a descriptor so long; two minutes by default
    ("grpc.so_reuseport", 0),  # two servers on one port would share its clients
)
CLIENT_OPTIONS = (
    *KEEPALIVE,
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", 4 * WINDOW),
    ("grpc.client_idle_timeout_ms", 120_000),  # between rounds a connection is worth less than its memory
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 5_000),
)


def server_options(longest: int) -> list[tuple[str, int]]:
    """For a server that takes messages of so many bytes."""
    return [*SERVER_OPTIONS, ("grpc.max_receive_message_length", longest)]


def server_credentials(identity: Identity) -> grpc.ServerCredentials:
    """A server that only members with a valid certificate can shake hands with.

    Not grpc.dynamic_ssl_server_credentials, which would follow a renewal: under many handshakes at once it
    ended the process
    (sync.cc "Check failed: prior > 0", grpcio 1.85). Renewed keys of the coordinator are taken at its next
    start.
    """
    return grpc.ssl_server_credentials(
        [(identity.key, identity.certificate)], identity.authority_pem, require_client_auth=True
    )


def client_credentials(identity: Identity) -> grpc.ChannelCredentials:
    """This member's own, for servers of its authority only."""
    return grpc.ssl_channel_credentials(identity.authority_pem, identity.key, identity.certificate)


def secure_channel(
    identity: Identity, address: str, alone: bool = False, longest: int = FRAME
) -> grpc.Channel:
    """A connection as this member, to whoever proves to be `address` in the same federation; `alone`: not
    shared with other channels.

    longest  bytes of a message that comes back
    """
    direct = (("grpc.enable_http_proxy", 0),) if is_loopback(address) else ()
    options = (
        *CLIENT_OPTIONS,
        *direct,
        ("grpc.max_receive_message_length", longest),
        ("grpc.use_local_subchannel_pool", int(alone)),
    )
    return grpc.secure_channel(address, client_credentials(identity), options=options)


class Door(grpc.ServerInterceptor):  # type: ignore[misc]  # grpc has no types
    """Names the peer of every call, refuses who is not allowed, and turns errors into sentences; an
    unforeseen error tells nothing of this machine."""

    def __init__(
        self, federation: str, allowed: AllowList, tell: Callable[[Event], None], calls: int
    ) -> None:
        self.allowed, self.tell, self.calls = allowed, tell, calls
        self._lock, self._busy = threading.Lock(), Counter[str]()
        self._silent: dict[int, tuple[float, Callable[[], object]]] = {}  # calls that have said nothing yet
        self._seen: dict[str, float] = {}
        self._read = functools.lru_cache(4096)(lambda pem: peer_from_tls(pem, federation))

    def peer(self, context: Any) -> Peer:
        """Who calls, from the certificate of its TLS connection. Raises T705."""
        held = context.auth_context().get("x509_pem_cert")
        if not held:
            raise FedtuneError(
                "T705", "a connection without a certificate", "mutual TLS", "use the keys of this federation"
            )
        peer: Peer = self._read(held[0])
        return peer

    def present(self, seconds: float = 60.0) -> list[str]:
        """Members that have called lately."""
        with self._lock:
            return sorted(name for name, when in self._seen.items() if time.monotonic() - when < seconds)

    def intercept_service(self, continuation: Any, details: Any) -> Any:
        handler = continuation(details)
        if handler is None:
            return None
        call = details.method.rpartition("/")[2]
        shapes = (handler.request_deserializer, handler.response_serializer)
        # a request of one message is taken as a stream, too: gRPC would wait for that message before anybody
        # is asked who calls, in a thread for each call, for ever
        if behavior := handler.unary_unary:
            return grpc.stream_unary_rpc_method_handler(self._single(self._first(behavior), call), *shapes)
        if behavior := handler.unary_stream:
            return grpc.stream_stream_rpc_method_handler(self._stream(self._first(behavior), call), *shapes)
        if behavior := handler.stream_unary:
            return grpc.stream_unary_rpc_method_handler(self._single(behavior, call), *shapes)
        return grpc.stream_stream_rpc_method_handler(self._stream(handler.stream_stream, call), *shapes)

    def _first(self, behavior: Any) -> Any:
        """For a handler of one message: wait for that, and not for long. Raises E808 where none comes."""

        def run(requests: Iterator[Any], context: Any) -> Any:
            with self._lock:
                self._silent[id(context)] = (time.monotonic(), context.cancel)
            try:
                request = next(requests, None)
            finally:
                with self._lock:
                    del self._silent[id(context)]
            if request is None:
                raise FedtuneError(
                    "E808", "a call without a message", "one", "install the same version on both sides"
                )
            return behavior(request, context)

        return run

    def cut_silent(self, seconds: float) -> None:
        """End calls that have said nothing for so long."""
        with self._lock:
            late = [cancel for began, cancel in self._silent.values() if time.monotonic() - began > seconds]
        for cancel in late:
            cancel()

    def _single(self, behavior: Any, call: str) -> Any:
        def run(request: Any, context: Any) -> Any:
            with self._judged(context, call):
                return behavior(request, context)

        return run

    def _stream(self, behavior: Any, call: str) -> Any:
        def run(request: Any, context: Any) -> Iterator[Any]:
            with self._judged(context, call):
                yield from behavior(request, context)

        return run

    @contextlib.contextmanager
    def _counted(self, name: str) -> Iterator[None]:
        """No member takes all threads. Raises NoRoom."""
        with self._lock:
            self._seen[name] = time.monotonic()
            if self._busy[name] >= self.calls:
                raise NoRoom(f"{self.calls} calls of '{name}' at the same time", "fewer", 2.0)
            self._busy[name] += 1
        try:
            yield
        finally:
            with self._lock:
                self._busy[name] -= 1

    @contextlib.contextmanager
    def _judged(self, context: Any, call: str) -> Iterator[None]:
        name = "?"
        try:
            peer = self.peer(context)
            name = peer.name.name
            self.allowed.check(peer)
            with self._counted(name):
                yield
        except FedtuneError as error:
            self.tell(CallRefused(call, name, error.code, str(error)))
            abort(context, error)
        except grpc.RpcError:  # the other end is gone
            raise
        except Exception as error:
            if (
                context.code() is not None or not context.is_active()
            ):  # ended already, by the handler or by the peer
                raise
            number = secrets.token_hex(4)
            self.tell(CallRefused(call, name, "X900", f"{number}: {type(error).__name__}: {error}"))
            context.abort(
                grpc.StatusCode.INTERNAL, f"X900: a defect of the coordinator, number {number} in its log"
            )

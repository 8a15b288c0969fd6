"""A client's way to the body service: a gRPC stream, or the service in the same process. Both carry the same
bytes."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import grpc

from fedtune.errors import FedtuneError
from fedtune.split.frames import CALL, CHUNK, LONGEST
from fedtune.split.grpc_server import KEEPALIVE, local
from fedtune.split.service import Service
from fedtune.wire.v1 import split_pb2 as pb

SIGN = pb.Frame(
    kind=pb.FRAME_CREDIT
).SerializeToString()  # of life, while the head or the tail takes its time


class Broken(Exception):
    """The stream is over; another one may do."""


class Channel(Protocol):
    """One stream. `sent` and `received` count bytes of messages."""

    sent: int
    received: int

    def send(self, message: bytes) -> None:
        """Raises Broken."""

    def receive(self) -> bytes:
        """The next message; waits for it. Raises Broken."""

    def close(self) -> None: ...


Dial = Callable[[], Channel]


class Local:
    """The service without a socket. Where its threads are not running, whoever waits for an answer computes
    it."""

    def __init__(self, service: Service) -> None:
        self.service, self.connection = service, service.connect()
        self.sent = self.received = 0

    def send(self, message: bytes) -> None:
        if self.connection.closed:
            raise Broken("closed")
        self.sent += len(message)
        self.connection.receive(message)

    def receive(self) -> bytes:
        while True:
            message = self.connection.next(None if self.service.threads else 0)
            if message is not None:
                self.received += len(message)
                return message
            if (
                self.connection.closed
                or self.service.threads
                or not (self.service.merger.step() or self.connection.waiting)
            ):
                raise Broken("nothing to wait for")

    def close(self) -> None:
        self.connection.close()


class Socket:
    """A gRPC stream. Sends a sign of life every `beat` seconds without a message, so that a lease ends with
    the process, not with its patience."""

    def __init__(
        self,
        address: str,
        credentials: grpc.ChannelCredentials | None = None,
        options: list[tuple[str, Any]] | None = None,
        beat: float = 5.0,
    ) -> None:
        """`options` are gRPC's, e.g. grpc.ssl_target_name_override. Raises FedtuneError S716 for a plain
        connection to another machine."""
        if credentials is None and not local(address):
            raise FedtuneError(
                "S716",
                f"no certificate for {address}",
                "mutual TLS, or a loopback address",
                "give the certificate that 'fedtune keys' issued",
            )
        self.sent = self.received = 0
        self.beat = beat
        options = [
            *KEEPALIVE,
            ("grpc.max_receive_message_length", LONGEST + CHUNK),
            ("grpc.enable_retries", 0),
            *(options or []),
        ]
        self.channel = (
            grpc.insecure_channel(address, options)
            if credentials is None
            else grpc.secure_channel(address, credentials, options)
        )
        self.outbox: queue.SimpleQueue[bytes | None] = (
            queue.SimpleQueue()
        )  # bounded by the window: a stream sends what credits allow
        self.call = self.channel.stream_stream(CALL)(self.outgoing())
        self.closed = threading.Event()

    def outgoing(self) -> Iterator[bytes]:
        while True:
            try:
                message = self.outbox.get(timeout=self.beat)
            except queue.Empty:
                message = SIGN
            if message is None:
                return
            yield message

    def send(self, message: bytes) -> None:
        if self.closed.is_set():
            raise Broken("closed")
        if self.call.done():
            raise Broken(f"{self.call.code().name}: {self.call.details()}")
        self.sent += len(message)
        self.outbox.put(message)

    def receive(self) -> bytes:
        try:
            message: bytes = next(self.call)
        except StopIteration:
            raise Broken("the service ended the stream") from None
        except grpc.RpcError as error:
            raise Broken(f"{error.code().name}: {error.details()}") from None
        self.received += len(message)
        return message

    def close(self) -> None:
        """Ends the stream after what was sent; gRPC gets a second to deliver it."""
        if self.closed.is_set():
            return
        self.closed.set()
        self.outbox.put(None)
        done = threading.Event()
        if self.call.add_callback(done.set):
            done.wait(1.0)
        self.call.cancel()
        self.channel.close()

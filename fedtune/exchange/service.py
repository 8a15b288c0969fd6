"""The gRPC service of the exchange, under mutual TLS: fetch, push, status.

server = serve(ServerStore(folder), load(keys), "0.0.0.0:9443")
...
server.stop()
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc

from fedtune.errors import FedtuneError, Refused
from fedtune.events import Event
from fedtune.exchange.chunks import packed, unpacked
from fedtune.exchange.connections import Connections
from fedtune.exchange.grpc_errors import NoRoom
from fedtune.exchange.limiter import Turns
from fedtune.exchange.limits import FRAME, Limits
from fedtune.exchange.server_store import ServerStore
from fedtune.exchange.tls import Door, server_credentials, server_options
from fedtune.exchange.uploads import Uploads
from fedtune.forms import Sha256
from fedtune.trust import COORDINATOR, AllowList, Identity, Signed
from fedtune.trust.envelope import OLDEST, PROTOCOL
from fedtune.trust.identity import ALLOWED
from fedtune.wire.v1 import exchange_pb2 as pb

NAME = "fedtune.wire.v1.Exchange"


class Service:
    """The three calls. The door has checked certificate and allow list before any of them runs."""

    def __init__(
        self,
        server_store: ServerStore,
        coordinator: Identity,
        door: Door,
        limits: Limits,
        tell: Callable[[Event], None],
        runs: Callable[[], Iterable[pb.RunStatus]] = tuple,
    ) -> None:
        self.server_store, self.door, self.limits, self.runs = server_store, door, limits, runs
        self.uploads = Uploads(server_store, coordinator, door.allowed, limits, tell)
        self._watched: dict[int, tuple[float, Callable[[], object]]] = {}
        self._lock, self._fetching = threading.Lock(), Counter[str]()
        self._turns = Turns(limits.downloads, limits.waiting, limits.wait_seconds, "downloads")

    def handlers(self) -> grpc.GenericRpcHandler:
        return grpc.method_handlers_generic_handler(
            NAME,
            {
                "Fetch": grpc.unary_stream_rpc_method_handler(
                    self.fetch, pb.FetchRequest.FromString, pb.Piece.SerializeToString
                ),
                "Push": grpc.stream_stream_rpc_method_handler(
                    self.push, pb.PushRequest.FromString, pb.PushReply.SerializeToString
                ),
                "Status": grpc.unary_unary_rpc_method_handler(
                    self.status, pb.StatusRequest.FromString, pb.StatusReply.SerializeToString
                ),
            },
        )

    def fetch(self, request: pb.FetchRequest, context: Any) -> Iterator[pb.Piece]:
        """A state that this client was given in this run. Raises E803, E806, E807, NoRoom, Refused W601."""
        peer, sha256 = self.door.peer(context), Sha256(request.sha256.hex())
        if not self.server_store.ledger.may_fetch(request.run, peer.name.name, sha256):
            found = f"a request of '{peer.name.name}' for object {sha256[:12]} of run {request.run[:80]!r}"
            raise FedtuneError(
                "E806", found, "a state that this client was given", "answer the coordinator's tickets only"
            )
        total = self.server_store.store.size(sha256)
        if request.offset > total:
            raise Refused(
                "W601", f"offset {request.offset}", f"at most {total}", "fetch it from the beginning"
            )
        with self._own(peer.name.name), self._turns.turn(context.is_active), self._watch(context):
            for piece in self.server_store.store.stream(sha256, request.offset):
                yield packed(piece, total)
                total = 0
                self._watched[id(context)] = (time.monotonic(), context.cancel)

    def push(self, requests: Iterator[pb.PushRequest], context: Any) -> Iterator[pb.PushReply]:
        """An update. Raises what Uploads raises, E808 for a stream that is not one."""
        peer = self.door.peer(context)
        with self._watch(context):
            first = next(requests, None)
        if first is None or first.WhichOneof("what") != "offer":
            raise FedtuneError(
                "E808",
                "a stream without an offer",
                "an offer first",
                "install the same version of fedtune on both sides",
            )
        certificate = bytes(context.auth_context()["x509_pem_cert"][0])
        with self.uploads.receive(
            peer, certificate, first.offer.envelope, first.offer.signature, context
        ) as upload:
            if isinstance(upload, Signed):
                signed = upload
            else:
                yield pb.PushReply(offset=upload.written)
                signed = self.uploads.take(upload, pieces(requests))
        yield pb.PushReply(
            receipt=pb.Receipt(
                record=signed.record, signature=signed.signature, certificate=signed.certificate
            )
        )

    def status(self, request: pb.StatusRequest, context: Any) -> pb.StatusReply:
        """Counts of the caller's runs; nothing changes."""
        peer, ledger = self.door.peer(context), self.server_store.ledger
        member = "" if peer.name.name == COORDINATOR else peer.name.name
        reply = pb.StatusReply(
            oldest_protocol=OLDEST,
            newest_protocol=PROTOCOL,
            sequence=ledger.newest(peer.key),
            now=time.time(),
        )
        for p in ledger.progress(request.run, member):
            reply.rounds.append(
                pb.RoundStatus(
                    run=p.run,
                    round=p.round,
                    verb=p.verb,
                    open=p.open,
                    asked=p.asked,
                    accepted=p.accepted,
                    bytes=p.bytes,
                )
            )
        reply.runs.extend(run for run in self.runs() if not member or ledger.is_member(run.run, member))
        names = self.door.present()
        reply.present = len(names)
        reply.names.extend([] if member else names)
        reply.uploads = len(self.uploads.active)
        reply.free_bytes = max(self.server_store.store.free() - self.limits.free_bytes, 0)
        return reply

    @contextlib.contextmanager
    def _own(self, name: str) -> Iterator[None]:
        """A site fetches one state, and one more while it does not know that a connection broke; no member
        takes all places. Raises NoRoom."""
        with self._lock:
            if self._fetching[name] >= self.limits.fetches:
                raise NoRoom(f"{self.limits.fetches} downloads of '{name}' at the same time", "fewer", 2.0)
            self._fetching[name] += 1
        try:
            yield
        finally:
            with self._lock:
                self._fetching[name] -= 1

    @contextlib.contextmanager
    def _watch(self, context: Any) -> Iterator[None]:
        with self._lock:
            self._watched[id(context)] = (time.monotonic(), context.cancel)
        try:
            yield
        finally:
            with self._lock:
                del self._watched[id(context)]

    def cut_stalled(self) -> None:
        """End streams that have not moved for too long: nobody keeps a slot by doing nothing."""
        self.uploads.cut_stalled()
        with self._lock:
            stalled = [
                cancel
                for moved, cancel in self._watched.values()
                if time.monotonic() - moved > self.limits.stall_seconds
            ]
        for cancel in stalled:
            cancel()


def pieces(requests: Iterator[pb.PushRequest]) -> Iterator[bytes]:
    """Raises E808, Refused W601, W606."""
    for request in requests:
        if request.WhichOneof("what") != "piece":
            raise FedtuneError(
                "E808",
                "a second offer in one stream",
                "pieces",
                "install the same version of fedtune on both sides",
            )
        yield unpacked(request.piece)


class Server:
    """A running exchange. `address` is where it listens."""

    def __init__(self, server: grpc.Server, service: Service, address: str, door: Door) -> None:
        self.server, self.service, self.address, self.door = server, service, address, door
        self._stopped = threading.Event()
        self.connections = Connections(int(address.rpartition(":")[2]), service.limits.connections)
        threading.Thread(target=self.connections.watch, args=(self._stopped,), daemon=True).start()
        self._watch = threading.Thread(target=self._look, daemon=True)
        self._watch.start()

    def _look(self) -> None:
        while not self._stopped.wait(min(1.0, self.service.limits.stall_seconds / 2)):
            self.service.cut_stalled()
            self.door.cut_silent(self.service.limits.stall_seconds)

    def stop(self, grace: float = 5.0) -> None:
        """Take no more calls, give those under way `grace` seconds; what has arrived stays."""
        self._stopped.set()
        self.server.stop(grace).wait()


def serve(
    server_store: ServerStore,
    identity: Identity,
    address: str,
    limits: Limits | None = None,
    tell: Callable[[Event], None] = lambda event: None,
    also: Sequence[Callable[[Door], grpc.GenericRpcHandler]] = (),
    threads: int = 0,
    longest: int = FRAME,
    runs: Callable[[], Iterable[pb.RunStatus]] = tuple,
) -> Server:
    """Start the exchange on `address` (host:port, port 0: any).

    Raises T705 for keys that are not the coordinator's, T706 for revoked ones, E801 for an address that
    cannot be had.

    also      other services behind the same door, each made with it (Door.peer names the caller)
    threads   that those need, streams at once
    longest   bytes of a message of theirs
    runs      what Status says of the runs themselves
    """
    if not identity.is_coordinator:
        raise FedtuneError(
            "T705",
            f"the keys of '{identity.name.name}'",
            "the coordinator's",
            "use the folder keys/coordinator",
        )
    limits = limits or Limits()
    allowed = AllowList(identity.folder / ALLOWED)
    allowed.check(identity.peer)
    door = Door(identity.name.federation, allowed, tell, limits.calls)
    service = Service(server_store, identity, door, limits, tell, runs)
    server_store.sweep()
    pool = ThreadPoolExecutor(limits.threads + threads, thread_name_prefix="exchange")
    server = grpc.server(
        pool,
        interceptors=(door,),
        options=server_options(max(FRAME, longest)),
        maximum_concurrent_rpcs=limits.threads + threads,
    )
    server.add_generic_rpc_handlers((service.handlers(), *(make(door) for make in also)))
    try:
        port = server.add_secure_port(address, server_credentials(identity))
    except RuntimeError:
        port = 0
    if not port:
        raise FedtuneError(
            "E801",
            f"address '{address}', which cannot be listened on",
            "a free port of this machine",
            "choose another, or end the program that uses it",
        )
    server.start()
    return Server(server, service, f"{address.rpartition(':')[0]}:{port}", door)

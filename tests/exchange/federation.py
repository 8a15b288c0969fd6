"""A federation on loopback for the tests of the exchange: keys, a server store, a server on a real socket,
and a proxy that breaks connections."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import socket
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from fedtune.events import Event
from fedtune.exchange import ExchangeClient, Limits, Server, ServerStore, serve
from fedtune.exchange.client import NAME
from fedtune.trust import Envelope, Identity, Ticket, envelope, load
from fedtune.trust.authority import Authority, create
from fedtune.wire.v1 import exchange_pb2 as pb
from tests.waiting import PATIENCE

BASE = "b" * 64
STATE = b"a state of the model" * 1000


class Federation:
    """One run ("run-1"), one open round (1, "train"), for site-a and site-b; site-c has keys and no part in
    it."""

    def __init__(self, folder: Path, budget: int = 32 << 20, **limits: Any) -> None:
        self.folder, self.budget, self.limits = folder, budget, limits
        self.authority: Authority = create(folder / "keys", "hospitals", ["localhost"], 30)
        self.sites = {name: load(self.authority.issue(name, 30)) for name in ("site-a", "site-b", "site-c")}
        self.coordinator = load(self.authority.place("coordinator"))
        self.told: list[Event] = []
        self.server_store = ServerStore(folder / "exchange")
        self.given = self.server_store.offer("run-1", STATE)
        self.open(1)
        self.server = self.start()

    def start(self, address: str = "localhost:0", **more: Any) -> Server:
        return serve(
            self.server_store,
            self.coordinator,
            address,
            Limits(**{"free_bytes": 0, **self.limits}),
            self.told.append,
            **more,
        )

    def open(
        self,
        number: int,
        run: str = "run-1",
        members: tuple[str, ...] = ("site-a", "site-b"),
        state: bytes = STATE,
    ) -> None:
        given = self.server_store.offer(run, state)
        self.server_store.open_round(run, number, "train", BASE, dict.fromkeys(members, given), self.budget)

    def ticket(
        self,
        site: str = "site-a",
        number: int = 1,
        run: str = "run-1",
        state: bytes = STATE,
        attempt: int = 1,
    ) -> Ticket:
        given = hashlib.sha256(state).hexdigest()
        return Ticket(
            run, number, site, "train", self.server.address, BASE, given, len(state), self.budget, attempt
        )

    def client(
        self, site: str = "site-a", address: str = "", patience: float = 20.0, **more: Any
    ) -> ExchangeClient:
        return ExchangeClient(
            address or self.server.address, self.sites[site], self.folder / "sites" / site, patience, **more
        )

    def codes(self) -> list[str]:
        """Codes of the calls that were refused."""
        return [event.code for event in self.told if hasattr(event, "code")]

    def close(self) -> None:
        self.server.stop(0)
        self.server_store.close()


def said(federation: Federation, data: bytes, site: str = "site-a", /, **altered: Any) -> Envelope:
    """An envelope as an honest client would write it, but for what is altered."""
    values = {
        "federation": "hospitals",
        "run": "run-1",
        "round": 1,
        "client": site,
        "verb": "train",
        "base": BASE,
        "given": federation.given,
    }
    values |= {
        "payload": hashlib.sha256(data).hexdigest(),
        "size": len(data),
        "sequence": 1,
        "nonce": envelope.new_nonce(),
    }
    return Envelope(**{**values, **altered})


def offer_of(envelope_: Envelope, signer: Identity) -> pb.PushRequest:
    """What a stream begins with."""
    data = envelope_.encode()
    return pb.PushRequest(offer=pb.Offer(envelope=data, signature=signer.sign(data)))


def push(
    client: ExchangeClient, envelope_: Envelope, pieces: Iterable[pb.Piece], signer: Identity | None = None
) -> list[pb.PushReply]:
    """A stream by hand: what an honest client would never send. Raises grpc.RpcError."""
    offer = offer_of(envelope_, signer or client.identity)
    requests = itertools.chain([offer], (pb.PushRequest(piece=piece) for piece in pieces))
    return list(client._push(requests, timeout=PATIENCE))


class Proxy:
    """TCP between a client and the server; cuts every connection once so many more bytes have gone up, or at
    a word."""

    def __init__(self, upstream: str) -> None:
        self.upstream = int(upstream.rpartition(":")[2])
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"localhost:{self.listener.getsockname()[1]}"
        self.up, self.cuts = 0, 0
        self.cut_at: list[int] = []  # counts of bytes up at which to cut, ascending
        self.pause = 0.0  # seconds before each 64 KiB up: a slow line
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self.listener.accept()
                try:
                    far = socket.create_connection(
                        ("localhost", self.upstream), 2
                    )  # of its two addresses gRPC may have got one only
                except OSError:  # the server is down
                    near.close()
                    continue
                for source, target, counts in ((near, far, True), (far, near, False)):
                    threading.Thread(target=self._pump, args=(source, target, counts), daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket, counts: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if counts:
                    time.sleep(self.pause)
                    self.up += len(data)
                    if self.cut_at and self.up >= self.cut_at[0]:
                        self.cut_at.pop(0)
                        self.cuts += 1
                        break
                target.sendall(data)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.listener.close()


@contextlib.contextmanager
def proxied(federation: Federation) -> Iterator[Proxy]:
    proxy = Proxy(federation.server.address)
    yield proxy
    proxy.close()


__all__ = ["BASE", "NAME", "STATE", "Federation", "Proxy", "proxied", "push", "said"]

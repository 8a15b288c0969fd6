"""A client's side of the exchange: fetch states, send updates until their receipts are held, whatever breaks
in between.

exchange = ExchangeClient(ticket.address, identity, folder)
state = exchange.fetch(ticket)
receipt = exchange.held(ticket) or exchange.send(ticket, compute(state))
"""

from __future__ import annotations

import queue
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import grpc

from fedtune.disk import disk_errors
from fedtune.errors import FedtuneError, Refused
from fedtune.exchange.cache import Cache
from fedtune.exchange.chunks import packed, unpacked
from fedtune.exchange.grpc_errors import understood
from fedtune.exchange.limits import CHUNK
from fedtune.exchange.outbox import Finished, Outbox
from fedtune.exchange.service import NAME
from fedtune.exchange.tls import secure_channel
from fedtune.exchange.tls_diagnosis import reason
from fedtune.trust import Identity, Receipt, Signed, Ticket, receipt
from fedtune.wire.v1 import exchange_pb2 as pb

T = TypeVar("T")
FIRST, LONGEST = 0.25, 30.0  # seconds of the backoff
FINAL = frozenset({"W602", "W604", "W606", "E805", "E806"})  # the coordinator will never take such an update
JITTER = random.SystemRandom()  # in no result, and no two clients may share it


class ExchangeClient:
    """One client's connection to one exchange. Safe in one thread at a time.

    folder     spool/ (finished updates, receipts) and cache/ (states), made private
    patience   seconds to go on trying while nothing moves; then the last error is raised, and what was
               finished stays spooled
    cache      most bytes of states to keep
    """

    def __init__(
        self, address: str, identity: Identity, folder: Path, patience: float = 600.0, cache: int = 4 << 30
    ) -> None:
        self.address, self.identity, self.patience = address, identity, patience
        self.outbox, self.cache = Outbox(folder / "spool", identity), Cache(folder / "cache", cache)
        self.channel = secure_channel(identity, address)
        self._fetch = self.channel.unary_stream(
            f"/{NAME}/Fetch", pb.FetchRequest.SerializeToString, pb.Piece.FromString
        )
        self._push = self.channel.stream_stream(
            f"/{NAME}/Push", pb.PushRequest.SerializeToString, pb.PushReply.FromString
        )
        self._status = self.channel.unary_unary(
            f"/{NAME}/Status", pb.StatusRequest.SerializeToString, pb.StatusReply.FromString
        )
        self._moved = time.monotonic()

    def close(self) -> None:
        self.channel.close()

    def status(self, run: str = "") -> pb.StatusReply:
        """What goes on in this client's runs. Raises E801, E802, T704 to T706."""
        reply: pb.StatusReply = self._trying(lambda: self._status(pb.StatusRequest(run=run), timeout=20))
        return reply

    def fetch(self, ticket: Ticket) -> bytes:
        """The state that a ticket names. Raises E801 to E807, R404, T704 to T706."""
        if (data := self.cache.get(ticket.given)) is not None:
            return data
        for _ in range(2):  # a part from before may be damaged: once more from the beginning
            self._trying(lambda: self._gather(ticket))
            if self.cache.keep(ticket.given) and (data := self.cache.get(ticket.given)) is not None:
                return data
        raise FedtuneError(
            "E807",
            sentence=f"state {ticket.given[:12]} does not match its hash",
            do="ask the coordinator's operator",
        )

    def held(self, ticket: Ticket) -> Receipt | None:
        """The receipt of an answer that was given, or finished, before: nothing need be computed then. None:
        it must be.

        Raises what `send` raises.
        """
        if signed := self.outbox.receipt(ticket):
            return receipt.read(signed, self.identity.authority)
        finished = self.outbox.finished(ticket)
        if finished and (finished.envelope.base, finished.envelope.given) == (ticket.base, ticket.given):
            try:
                return self._deliver(finished)
            except Refused as error:
                if error.code != "W601" or self.outbox.finished(ticket):
                    raise  # otherwise it was damaged here, and is gone
        return None

    def send(self, ticket: Ticket, data: bytes) -> Receipt:
        """Outbox an update, push it, hold its receipt. What is not refused for good stays spooled.

        Raises FedtuneError E801 to E808, T704 to T707, R404, Refused W601 to W606.
        """
        if len(data) > ticket.budget:
            raise Refused(
                "W606",
                f"an update of {len(data)} bytes",
                f"at most {ticket.budget}",
                "use the recipe's message chain",
            )
        return self._deliver(self.outbox.keep(ticket, data))

    def flush(self) -> list[Receipt]:
        """Send what waits from before. What is refused for good is dropped with its reason; raises when
        nothing can be sent now."""
        done = []
        for finished in self.outbox.waiting():
            try:
                done.append(self._deliver(finished))
            except FedtuneError as error:
                if error.code not in FINAL and finished.path.exists():
                    raise
        return done

    # --- parts ---

    def _deliver(self, finished: Finished) -> Receipt:
        """Until the receipt is held."""
        for turn in range(3):
            try:
                signed = self._trying(lambda: self._upload(finished))  # noqa: B023  # called before `finished` changes
                break
            except FedtuneError as error:
                if error.code in FINAL:
                    self.outbox.give_up(finished, error)
                if (
                    turn == 2
                    or error.code not in ("W601", "W605", "T707")
                    or (error.code == "W601" and self.outbox.damaged(finished))
                ):
                    raise
                if (
                    error.code != "W601"
                    # the count was taken (this outbox may be new), or the keys were renewed since it was
                    # signed
                ):
                    finished = self.outbox.sign_again(finished, self.status().sequence)
        read = receipt.read(signed, self.identity.authority, finished.envelope)
        self.outbox.settle(finished, signed)
        return read

    def _gather(self, ticket: Ticket) -> None:
        """The rest of a state into the cache's part file."""
        part = self.cache.part(ticket.given)
        with disk_errors(part), part.open("ab") as file:
            at = file.tell()
            if at > ticket.given_size:
                at = file.truncate(0)
            request = pb.FetchRequest(run=ticket.run, sha256=bytes.fromhex(ticket.given), offset=at)
            for piece in self._fetch(request):
                data = unpacked(piece)
                at += len(data)
                if at > ticket.given_size:
                    raise Refused(
                        "W606",
                        f"a state of more than {ticket.given_size} bytes",
                        "as many as the ticket says",
                        "ask the coordinator's operator",
                    )
                file.write(data)
                self._moved = time.monotonic()
        if at < ticket.given_size:
            raise FedtuneError("E808", f"a state of {at} bytes", f"{ticket.given_size}", "fetch it again")

    def _upload(self, finished: Finished) -> Signed:
        """One connection's worth of an upload; raises grpc.RpcError where it breaks."""
        start: queue.SimpleQueue[int | None] = queue.SimpleQueue()

        def requests() -> Iterator[pb.PushRequest]:
            yield pb.PushRequest(
                offer=pb.Offer(envelope=finished.envelope.encode(), signature=finished.signature)
            )
            if (offset := start.get()) is None:
                return
            with finished.path.open("rb") as file:
                file.seek(offset)
                while data := file.read(CHUNK):
                    self._moved = time.monotonic()
                    yield pb.PushRequest(piece=packed(data))

        try:
            for reply in self._push(requests()):
                if reply.WhichOneof("what") == "receipt":
                    return Signed(reply.receipt.record, reply.receipt.signature, reply.receipt.certificate)
                start.put(reply.offset)
        finally:
            start.put(None)  # lets go of the thread that sends
        raise FedtuneError("E808", "an upload that ended without a receipt", "one", "send it again")

    def _trying(self, call: Callable[[], T]) -> T:
        """Again while it may help: at the pace that the exchange names, or with a backoff of full jitter.
        Raises what the last try said."""
        last, turn, looked = time.monotonic(), 0, False
        while True:
            try:
                return call()
            except grpc.RpcError as broken:
                error, wait = understood(broken, self.address)
                if wait is None:
                    raise error from None
                if broken.code() is grpc.StatusCode.UNAVAILABLE and not looked:
                    looked = True
                    if why := reason(self.identity, self.address):
                        raise why from None
            if self._moved > last:
                last, turn = self._moved, 0
            if time.monotonic() - last > self.patience:
                raise error
            if wait:
                pause = wait * JITTER.uniform(0.75, 1.5)
            else:
                pause, turn = JITTER.uniform(0, min(LONGEST, FIRST * 2**turn)), turn + 1
            time.sleep(min(pause, max(0.05, last + self.patience - time.monotonic())))

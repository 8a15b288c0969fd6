"""The body service: one frozen body for many clients, over gRPC or, for a simulation, in the same process.

A `Connection` is one stream: it takes frames, answers bad ones with an ERROR frame and goes on, and gives
frames back. What it needs of
a client between frames is a few digests; hidden states are held only where the client opted in. See docs of
fedtune/split/frames.py.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from fedtune.errors import FedtuneError, Refused
from fedtune.split.batching import MERGING, Job, Merger, Merging
from fedtune.split.body import Body
from fedtune.split.codec import NAMES, Coding, encode
from fedtune.split.frames import LIMITS, Joiner, Limits, Parcel, failed, packed, parsed
from fedtune.split.session import Admit, HeldSamples, Offer, Session, check
from fedtune.split.work import Missing, Work, keep, prepared
from fedtune.split.writer import Writer
from fedtune.wire.v1 import split_pb2 as pb

GREETING = 10.0  # seconds within which a stream says a HELLO that is accepted
BACKLOG = 256  # frames that wait for a slow reader before its own frames are read no further


@dataclass(frozen=True)
class Terms:
    """What the service grants.

    credits   micro-batches in flight: of one session, and of all together
    sessions  live at the same time
    lease     seconds without a frame after which a session is freed
    memory    bytes held for clients that opted in, and for how many seconds; 0: nothing is
    waiting   bytes of micro-batches, as float32, that wait for the body; above it streams are read no further
    """

    credits: int = 8
    together: int = 256
    sessions: int = 64
    lease: float = 60.0
    memory: int = 1 << 30
    seconds: float = 3600.0
    waiting: int = 1 << 30
    limits: Limits = LIMITS


TERMS = Terms()


def never(run: str, round: int) -> bool:
    return False


class Service:
    """Sessions, their leases, and the merger that computes. `start` runs the computing, the writing and the
    sweeping thread; without it, `Local` channels compute and write."""

    def __init__(
        self,
        body: Body,
        offer: Offer,
        admit: Admit,
        terms: Terms = TERMS,
        merging: Merging | None = MERGING,
        over: Callable[[str, int], bool] = never,
    ) -> None:
        """over: whether a round of a run is; its clients are told so and their sessions ended, and nobody new
        is admitted to it."""
        self.offer, self.admit, self.terms, self.over = offer, admit, terms, over
        self.merger = Merger(body, merging)
        self.held = HeldSamples(terms.memory, terms.seconds)
        self.sessions: dict[str, Session] = {}
        self.connections: set[Connection] = set()
        self.errors: Counter[str] = Counter()
        self.coarser: Counter[str] = Counter()  # codings of answers
        self.lock = threading.RLock()
        self.stopped = threading.Event()
        self.threads: list[threading.Thread] = []
        self.writer: Writer | None = None

    def start(self) -> Service:
        self.writer = Writer()
        self.threads = [threading.Thread(target=run, daemon=True) for run in (self.compute, self.watch)]
        for thread in self.threads:
            thread.start()
        return self

    def stop(self) -> None:
        self.stopped.set()
        for connection in list(self.connections):
            connection.close()
        for thread in self.threads:
            thread.join()
        if self.writer is not None:
            self.writer.stop()

    def compute(self) -> None:
        while not self.stopped.is_set():
            self.merger.step(0.2)

    def watch(self) -> None:
        while not self.stopped.wait(min(1.0, self.terms.lease / 4)):
            with contextlib.suppress(FedtuneError):  # `over` asks others, who may not be able to answer now
                self.sweep()

    def sweep(self) -> None:
        """Free connections and sessions whose lease or round is over, and what was held too long."""
        late = time.monotonic() - self.terms.lease
        for connection in list(self.connections):
            if (connection.seen < late and not connection.working) or (
                connection.session is None and connection.began < time.monotonic() - GREETING
            ):
                connection.close()
        with self.lock:
            sessions = list(self.sessions.items())
        past = {turn for turn in {session.turn for _, session in sessions} if self.over(*turn)}
        for name, session in sessions:
            with self.lock:
                connection = session.connection
                if session.turn in past or (connection is None and session.seen < late):
                    self.sessions.pop(name, None)
            if session.turn in past and connection is not None:
                connection.close()
        self.held.sweep()

    def connect(self, peer: str = "", cancel: Callable[[], Any] | None = None) -> Connection:
        connection = Connection(self, peer, cancel)
        with self.lock:
            self.connections.add(connection)
        return connection

    # --- sessions ---

    def open(self, hello: pb.Hello, connection: Connection) -> Session:
        """A new session, or one whose client came back. Raises Refused."""
        check(hello, self.offer, self.admit, connection.peer)
        if self.over(hello.run, hello.round):
            raise Refused(
                "S712",
                f"round {hello.round}, which is over",
                "the open round",
                "drop this answer and wait to be asked again",
            )
        hello.ClearField("token")
        with self.lock:
            session = self.sessions.get(hello.session)
            if session and (session.hello.run, session.hello.round, session.hello.client) != (
                hello.run,
                hello.round,
                hello.client,
            ):
                raise Refused(
                    "S712", "the session of another client", "its own session", "use fedtune's client"
                )
            live = [each for each in self.sessions.values() if each.connection is not None]
            mine = [
                each for each in live if each.owner == (hello.run, hello.client)
            ]  # a client that lost its connection, or was started again
            if not mine and len(live) >= self.terms.sessions:
                raise Refused(
                    "S712", f"{len(live)} sessions", f"at most {self.terms.sessions}", "try again later"
                )
            for each in mine:
                each.connection.close()
            for name, each in list(self.sessions.items()):
                if each.owner == (hello.run, hello.client) and name != hello.session:
                    del self.sessions[name]
            session = session or Session(hello, time.monotonic(), None)
            session.hello, session.connection, session.granted, session.flight = hello, connection, 0, 0
            self.sessions[hello.session] = session
            self.regrant()
        return session

    def leave(self, connection: Connection) -> None:
        """A stream is over: what its session waits for and has left here for a BACKWARD is dropped, its
        digests stay for a lease."""
        with self.lock:
            self.connections.discard(connection)
            session = connection.session
            if session is not None and session.connection is connection:
                session.connection, session.seen = None, time.monotonic()
                self.merger.forget(session.hello.session)
                self.held.drop(session.hello.session)
                self.regrant()

    def forget(self, session: Session) -> None:
        with self.lock:
            self.sessions.pop(session.hello.session, None)

    def regrant(self) -> None:
        """Share the window of all among the live sessions, and tell those whose share changed."""
        live = [session for session in self.sessions.values() if session.connection is not None]
        for session in live:
            share = max(1, min(session.hello.credits, self.terms.credits, self.terms.together // len(live)))
            if session.granted not in (0, share):
                session.connection.put(pb.Frame(kind=pb.FRAME_CREDIT, credits=share).SerializeToString())
            session.granted = share

    @property
    def live(self) -> int:
        """Micro-batches that the service holds for clients: waiting, being computed, or answered and not yet
        taken."""
        with self.lock:
            return sum(session.flight for session in self.sessions.values() if session.connection is not None)


class Connection:
    """One stream: `receive` is called by one thread with its messages, `outgoing` gives the answers to
    another."""

    def __init__(self, service: Service, peer: str, cancel: Callable[[], Any] | None) -> None:
        self.service, self.peer, self.cancel = service, peer, cancel
        self.session: Session | None = None
        self.joiner = Joiner(service.terms.limits)
        self.began = self.seen = time.monotonic()
        self.closed = False
        self.waiting: deque[tuple[bytes, bool]] = deque()  # messages, and whether one ends an answer
        self.changed = threading.Condition()
        self.working = 0  # jobs of this stream that are not computed yet

    # --- messages in ---

    def receive(self, data: bytes) -> None:
        """One message. Whatever is wrong with it is answered by an ERROR frame; nothing is raised."""
        self.seen, sequence = time.monotonic(), 0
        try:
            frame = parsed(data)
            sequence = frame.sequence
            if frame.kind == pb.FRAME_HELLO:
                self.greet(frame)
            elif self.session is None:
                raise Refused("S712", "a frame before HELLO", "HELLO first", "open a session")
            elif frame.kind in (pb.FRAME_FORWARD, pb.FRAME_BACKWARD):
                if frame.part == 0 and self.session.flight >= self.service.terms.credits:
                    raise Refused(
                        "S715",
                        f"{self.session.flight} micro-batches in flight",
                        "no more than were granted",
                        "wait for an answer",
                    )
                if (parcel := self.joiner.add(frame)) is not None:
                    self.take(self.session, parcel)
            elif frame.kind == pb.FRAME_BYE:
                self.service.forget(self.session)
                self.close()
            elif frame.kind != pb.FRAME_CREDIT:
                raise Refused(
                    "W601",
                    f"a frame of kind {frame.kind}",
                    "HELLO, FORWARD, BACKWARD, CREDIT or BYE",
                    "use the same version on both sides",
                )
        except Missing as missing:
            self.refuse(sequence, missing, missing.samples)
        except FedtuneError as error:
            self.refuse(sequence, error)
        except Exception as error:  # a defect of ours must not end a stream, let alone the service
            self.refuse(sequence, failure(error))

    def greet(self, frame: pb.Frame) -> None:
        if self.session is not None:
            raise Refused("S712", "a second HELLO on a stream", "one", "open another stream")
        self.session = session = self.service.open(frame.hello, self)
        terms, granted = self.service.terms, pb.Hello()
        granted.CopyFrom(frame.hello)
        granted.credits, granted.lease, granted.largest = (
            session.granted,
            max(1, int(terms.lease)),
            terms.limits.payload,
        )
        granted.cache, granted.lean = (
            frame.hello.cache and terms.memory > 0,
            frame.hello.lean and terms.memory > 0,
        )
        self.put(pb.Frame(kind=pb.FRAME_HELLO, hello=granted).SerializeToString())

    def take(self, session: Session, parcel: Parcel) -> None:
        """A whole micro-batch: checked, noted, queued. Where too much waits already, this stream is read no
        further for a while. Raises Refused, Missing."""
        service, backward = self.service, parcel.frame.kind == pb.FRAME_BACKWARD
        if self.cancel is not None:
            service.merger.wait_below(service.terms.waiting, lambda: self.closed)
        work = prepared(parcel, session, service.held, service.terms.limits)
        with service.lock:
            session.admit(pb.FRAME_FORWARD, parcel.frame.sequence, work.forward)
            if backward:
                session.admit(pb.FRAME_BACKWARD, parcel.frame.sequence, parcel.digest)
            session.flight += 1
            self.working += 1
        self.seen = time.monotonic()
        keep(parcel, session, service.held)

        def done(result: torch.Tensor | None, error: Exception | None) -> None:
            if service.writer is None:
                self.answer(session, parcel, work, result, error)
            else:
                service.writer.later(result, lambda: self.answer(session, parcel, work, result, error))

        service.merger.submit(Job(session.hello.session, work.hidden, work.side, work.grad, done))

    # --- messages out ---

    def answer(
        self,
        session: Session,
        parcel: Parcel,
        work: Work,
        result: torch.Tensor | None,
        error: Exception | None,
    ) -> None:
        """Called by the writing thread, or by the computing one where there is no other."""
        sequence, messages = parcel.frame.sequence, list[bytes]()
        try:
            if result is None:
                raise error or RuntimeError("no result")
            backward = work.grad is not None
            coding = Coding(NAMES[session.hello.number], session.hello.group)
            coded, used = encode(
                pb.ROLE_GRADIENT if backward else pb.ROLE_HIDDEN, work.finish(result), coding
            )
            if used != coding.name:
                self.service.coarser[used] += 1
            kind = pb.FRAME_GRADIENT if backward else pb.FRAME_ACTIVATION
            messages, _, _ = packed(pb.Frame(kind=kind, sequence=sequence, digest=parcel.digest), [coded])
            if backward:
                self.service.held.drop(session.hello.session, sequence)
        except Exception as raised:  # a defect must not end the thread that answers all
            refused = raised if isinstance(raised, FedtuneError) else failure(raised)
            self.service.errors[refused.code] += 1
            messages = [failed(sequence, refused)]
        with self.service.lock:
            self.working -= 1
        self.seen = time.monotonic()
        for message in messages[:-1]:
            self.put(message)
        self.put(messages[-1], True)

    def refuse(self, sequence: int, error: FedtuneError, samples: tuple[int, ...] = ()) -> None:
        self.service.errors[error.code] += 1
        if self.cancel is not None:
            with self.changed:
                self.changed.wait_for(lambda: self.closed or len(self.waiting) < BACKLOG)
        self.put(failed(sequence, error, samples))

    def put(self, message: bytes, last: bool = False) -> None:
        with self.changed:
            if not self.closed:
                self.waiting.append((message, last))
                self.changed.notify_all()

    def next(self, timeout: float | None = None) -> bytes | None:
        """The next message for the client; None when the stream is over, or nothing came in time."""
        with self.changed:
            if timeout != 0:
                self.changed.wait_for(lambda: self.closed or bool(self.waiting), timeout)
            if self.closed or not self.waiting:
                return None
            message, last = self.waiting.popleft()
            self.changed.notify_all()
        if last and self.session is not None:
            with self.service.lock:
                self.session.flight = max(0, self.session.flight - 1)
        return message

    def outgoing(self) -> Iterator[bytes]:
        while (message := self.next()) is not None:
            yield message

    def close(self) -> None:
        """The stream is over, from either side; what it holds is freed."""
        with self.changed:
            if self.closed:
                return
            self.closed = True
            self.waiting.clear()
            self.changed.notify_all()
        self.joiner = Joiner(self.service.terms.limits)
        self.service.leave(self)
        if self.cancel is not None:
            self.cancel()


def failure(error: Exception) -> FedtuneError:
    """What a model raised, as an answer; its text may help, and is cut short."""
    return FedtuneError(
        "S714",
        sentence=f"the body failed with {type(error).__name__}: {str(error)[:200]}",
        do="see the log of the body service",
    )

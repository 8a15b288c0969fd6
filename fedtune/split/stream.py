"""A client's session with the body service: micro-batches in flight, answers in, and what is said again when
the stream breaks."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import time
from collections import Counter
from dataclasses import dataclass

import torch

from fedtune.errors import CATALOGUE, FedtuneError, Refused
from fedtune.split.channel import Broken, Channel, Dial
from fedtune.split.codec import NUMBERS, Coded, decode, encode, encode_whole, finite
from fedtune.split.frames import LIMITS, VERSION, Joiner, Limits, Parcel, packed, parsed
from fedtune.split.micro import WISHES, BodyReply, Micro, Turn, Wishes
from fedtune.split.session import Offer
from fedtune.wire.v1 import split_pb2 as pb

FRUITLESS = 5  # streams in a row that break before an answer: a link that flickers; more are no accident


@dataclass
class Flight:
    """A micro-batch from its FORWARD to its last answer; what is needed to say it again."""

    micro: Micro
    tensors: list[Coded]
    forward: bytes = b""  # digest of the FORWARD
    digest: bytes = b""  # of the last message
    gradient: Coded | None = None
    came: tuple[int, ...] = ()  # shape of the activation
    waits: bool = True


class Stream:
    """One session. Used by one thread. Raises FedtuneError S711 where the service cannot be reached, and
    whatever it answers."""

    def __init__(
        self,
        dial: Dial,
        offer: Offer,
        turn: Turn,
        wishes: Wishes = WISHES,
        limits: Limits = LIMITS,
        held: set[int] | None = None,
    ) -> None:
        """`held`: the set that this client's streams of a run share, of samples that the service holds as far
        as this side knows."""
        self.dial, self.wishes, self.limits = dial, wishes, limits
        coding = wishes.coding
        self.hello = pb.Hello(
            version=VERSION,
            session=os.urandom(16).hex(),
            run=turn.run,
            round=turn.round,
            client=turn.client,
            token=turn.token,
            model=offer.model,
            part=offer.part,
            first=offer.first,
            last=offer.last,
            width=offer.width,
            masked=wishes.masked,
            positioned=wishes.positioned,
            prompts=wishes.prompts,
            credits=wishes.window,
            lean=wishes.lean,
            cache=wishes.cache,
            number=NUMBERS[coding.name],
            group=min(coding.group, offer.width) if coding.name == "int8" else 0,
        )
        self.channel: Channel | None = None
        self.joiner = Joiner(limits)
        self.flights: dict[int, Flight] = {}
        self.numbers = itertools.count(1)
        self.window, self.lean, self.cache = 1, False, False  # what is granted
        self.held: set[int] = set() if held is None else held
        self.codings: Counter[str] = Counter()  # of what was sent
        self.again = 0  # micro-batches said again
        self.before = [0, 0]  # bytes of earlier channels
        self.fruitless, self.heard = 0, time.monotonic()  # streams since the last answer, and when it came
        self.connect()

    # --- asking ---

    @property
    def room(self) -> bool:
        """Whether another micro-batch may be sent now."""
        return len(self.flights) < self.window

    def forward(self, micro: Micro) -> int:
        """Send a micro-batch; its number."""
        sequence, flight = next(self.numbers), Flight(micro, [])
        self.flights[sequence] = flight
        self.fill(flight)
        self.say(sequence, flight)
        return sequence

    def backward(self, sequence: int, grad: torch.Tensor) -> None:
        """Send the gradient at the activation that came for this number."""
        flight = self.flights[sequence]
        if tuple(grad.shape) != flight.came:
            raise ValueError(
                f"a gradient of shape {tuple(grad.shape)} for activations of shape {flight.came}"
            )
        flight.gradient, used = encode(pb.ROLE_GRADIENT, grad, self.wishes.coding)
        self.codings[used] += 1
        flight.waits = True
        self.say(sequence, flight)

    def done(self, sequence: int) -> None:
        """No gradient will be asked for."""
        del self.flights[sequence]

    def answer(self) -> BodyReply:
        """The next answer, in any order of numbers; waits, and says again what a broken stream may have
        lost."""
        while True:
            try:
                assert self.channel is not None
                frame = parsed(self.channel.receive())
            except Broken as broken:
                self.reconnect(str(broken))
                continue
            if frame.kind == pb.FRAME_CREDIT:
                self.window = min(self.wishes.window, max(1, frame.credits))
            elif frame.kind == pb.FRAME_ERROR:
                self.failed(frame)
            elif (parcel := self.joiner.add(frame)) is not None:
                return self.taken(parcel)

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """The session is over; the service forgets it. To be called after an error, too: what was in flight
        then is lost."""
        if self.channel is not None:
            with contextlib.suppress(Broken):  # then its lease ends it
                self.channel.send(pb.Frame(kind=pb.FRAME_BYE).SerializeToString())
            self.hang_up()

    @property
    def sent(self) -> int:
        return self.before[0] + (self.channel.sent if self.channel else 0)

    @property
    def received(self) -> int:
        return self.before[1] + (self.channel.received if self.channel else 0)

    # --- parts ---

    def fill(self, flight: Flight, whole: bool = False) -> None:
        """The FORWARD's tensors; hidden states are left out where the service holds them, unless `whole`."""
        micro, tensors = flight.micro, []
        held = self.cache and bool(micro.samples) and self.held.issuperset(micro.samples) and not whole
        if not held:
            tensors.append(
                self.coded(pb.ROLE_HIDDEN, micro.hidden() if callable(micro.hidden) else micro.hidden)
            )
            if self.cache:
                self.held.update(micro.samples)
        if micro.side.mask is not None:
            tensors.append(encode_whole(pb.ROLE_MASK, micro.side.mask))
        if micro.side.positions is not None:
            tensors.append(encode_whole(pb.ROLE_POSITIONS, micro.side.positions))
        if micro.prompts is not None:
            tensors.append(self.coded(pb.ROLE_PROMPTS, micro.prompts))
        if micro.rows is not None:
            tensors.append(encode_whole(pb.ROLE_ROWS, micro.rows))
        flight.tensors = tensors

    def coded(self, role: pb.Role, value: torch.Tensor) -> Coded:
        coded, used = encode(role, value, self.wishes.coding)
        self.codings[used] += 1
        return coded

    def say(self, sequence: int, flight: Flight, whole: bool = False) -> None:
        """Send what a micro-batch waits for; a broken stream is mended when the answer is waited for."""
        micro, backward = flight.micro, flight.gradient is not None
        lean = backward and self.lean and not whole
        frame = pb.Frame(kind=pb.FRAME_BACKWARD if backward else pb.FRAME_FORWARD, sequence=sequence)
        if lean:
            frame.digest = flight.forward
        else:
            frame.at, frame.row = micro.at, 0 if micro.row is None else micro.row + 1
            if self.cache:
                frame.samples.extend(micro.samples)
        tensors = [
            *([] if lean else flight.tensors),
            *([flight.gradient] if flight.gradient is not None else []),
        ]
        messages, flight.digest, forward = packed(frame, tensors)
        if not backward:
            flight.forward = forward
        with contextlib.suppress(Broken):
            for message in messages:
                assert self.channel is not None
                self.channel.send(message)

    def taken(self, parcel: Parcel) -> BodyReply:
        """An answer, if it is to what was asked. Raises Refused S717, W603, W607."""
        sequence, backward = parcel.frame.sequence, parcel.frame.kind == pb.FRAME_GRADIENT
        flight = self.flights.get(sequence)
        if (
            flight is None
            or not flight.waits
            or backward != (flight.gradient is not None)
            or parcel.frame.digest != flight.digest
        ):
            raise Refused(
                "S717",
                f"an answer to other bytes than micro-batch {sequence}",
                "the answer to it",
                "do not trust this service",
            )
        role, wanted = (pb.ROLE_GRADIENT, self.comes_back(flight)) if backward else (pb.ROLE_HIDDEN, None)
        coded = parcel.tensors.get(role) or next(iter(parcel.tensors.values()), None)
        if (
            coded is None
            or len(parcel.tensors) != 1
            or (wanted or coded.shape) != coded.shape
            or coded.shape[-1] != self.hello.width
        ):
            raise Refused(
                "W603",
                f"an answer of shape {coded.shape if coded else ()}",
                f"{wanted}",
                "use the same version on both sides",
            )
        value = decode(coded)
        if not finite(value):
            raise Refused(
                "W607",
                f"an answer to micro-batch {sequence} that is not finite",
                "finite numbers",
                "lower the learning rate",
            )
        flight.waits = False
        self.fruitless, self.heard = 0, time.monotonic()
        if backward:
            del self.flights[sequence]
        else:
            flight.came = coded.shape
        return BodyReply(sequence, backward, value)

    def failed(self, frame: pb.Frame) -> None:
        """An ERROR: what is not held is said again; the rest is raised."""
        failure, flight = frame.failure, self.flights.get(frame.sequence)
        if failure.code != "S713" or flight is None:
            code = failure.code if failure.code in CATALOGUE else "S714"
            raise FedtuneError(code, failure.found, failure.expected, failure.advice)
        self.held.difference_update(failure.samples)
        self.repeat(frame.sequence, flight)

    def repeat(self, sequence: int, flight: Flight) -> None:
        """Say a micro-batch again, with everything that its answer needs."""
        self.again += 1
        if all(coded.header.role != pb.ROLE_HIDDEN for coded in flight.tensors):
            self.fill(flight, whole=True)
        self.say(sequence, flight, whole=True)

    # --- connections ---

    def connect(self) -> None:
        """Open a stream, trying for `patience` seconds; pauses double up to 5 s, and differ between clients,
        who all lost it at once."""
        began, why = time.monotonic(), ""
        for attempt in itertools.count():
            try:
                self.channel = self.dial()
                self.channel.send(pb.Frame(kind=pb.FRAME_HELLO, hello=self.hello).SerializeToString())
                frame = parsed(self.channel.receive())
                break
            except Broken as broken:
                why = str(broken)
                self.hang_up()
            pause = min(5.0, 0.1 * 2**attempt) * random.SystemRandom().uniform(0.5, 1.5)
            if time.monotonic() + pause - began > self.wishes.patience:
                raise FedtuneError(
                    "S711",
                    sentence=f"the body service did not answer after {attempt + 1} tries ({why[:200]})",
                    do="check its address, and that it runs",
                ) from None
            time.sleep(pause)
        if frame.kind == pb.FRAME_ERROR:
            self.hang_up()
            self.failed(frame)
        self.window = min(self.wishes.window, max(1, frame.hello.credits))
        self.lean, self.cache = frame.hello.lean, frame.hello.cache

    def reconnect(self, why: str) -> None:
        """Another stream, and everything that waits for an answer once more, in order. Raises S711 where
        streams break again and again before an answer."""
        self.hang_up()
        self.fruitless += 1
        if self.fruitless > FRUITLESS:
            if time.monotonic() - self.heard > self.wishes.patience:
                sentence = f"{self.fruitless} streams in a row broke before an answer came ({why[:200]})"
                raise FedtuneError(
                    "S711",
                    sentence=sentence,
                    do="see the log of the body service, and check proxies and firewalls on the way",
                )
            time.sleep(min(1.0, self.wishes.patience))
        self.joiner = Joiner(self.limits)
        self.connect()
        for sequence, flight in sorted(self.flights.items()):
            if flight.waits:
                self.repeat(sequence, flight)

    def hang_up(self) -> None:
        if self.channel is not None:
            self.before = [self.sent, self.received]
            channel, self.channel = self.channel, None
            channel.close()

    def comes_back(self, flight: Flight) -> tuple[int, ...]:
        """The shape of the gradient: that of the prompts, or of the hidden states."""
        wanted = pb.ROLE_PROMPTS if self.hello.prompts else pb.ROLE_HIDDEN
        return next((coded.shape for coded in flight.tensors if coded.header.role == wanted), ())

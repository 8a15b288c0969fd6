"""A thousand frames that nobody should have sent: each is answered by an ERROR frame, the service lives, its
memory is flat."""

from __future__ import annotations

import gc
import random
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import psutil
import pytest
import torch

from fedtune.errors import CATALOGUE
from fedtune.split.channel import Broken, Socket
from fedtune.split.codec import Coding, encode, encode_whole
from fedtune.split.cut import Side
from fedtune.split.frames import CHUNK, packed
from fedtune.split.grpc_server import OPTIONS, handler
from fedtune.split.micro import Micro
from fedtune.split.service import Terms
from fedtune.wire.v1 import split_pb2 as pb
from tests.split.plain import (
    WIDTH,
    Model,
    PlainBody,
    batches,
    listening,
    near,
    opened,
    run,
    served,
    split_step,
)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def micro(
    sequence: int,
    rows: int = 2,
    tokens: int = 5,
    width: int = WIDTH,
    mask: bool = True,
    value: float = 1.0,
    kind: Any = pb.FRAME_FORWARD,
) -> pb.Frame:
    """A good micro-batch, of one part."""
    tensors = [encode(pb.ROLE_HIDDEN, torch.full((rows, tokens, width), value), Coding("fp32"))[0]]
    if mask:
        tensors.append(encode_whole(pb.ROLE_MASK, torch.ones(rows, tokens)))
    if kind == pb.FRAME_BACKWARD:
        tensors.append(encode(pb.ROLE_GRADIENT, torch.full((rows, tokens, width), value), Coding("fp32"))[0])
    return pb.Frame.FromString(packed(pb.Frame(kind=kind, sequence=sequence), tensors)[0][0])


def spoil(place: int, what: bytes) -> Callable[[pb.Frame], None]:
    """Write over the payload."""

    def change(frame: pb.Frame) -> None:
        frame.payload = frame.payload[:place] + what + frame.payload[place + len(what) :]

    return change


def claim(*shape: int, payload: int = 0) -> Callable[[pb.Frame], None]:
    def change(frame: pb.Frame) -> None:
        frame.tensors[0].shape[:] = shape
        if payload:
            frame.payload = bytes(payload)

    return change


def field(**values: Any) -> Callable[[pb.Frame], None]:
    def change(frame: pb.Frame) -> None:
        for name, value in values.items():
            setattr(frame, name, value)

    return change


def header(place: int, **values: Any) -> Callable[[pb.Frame], None]:
    def change(frame: pb.Frame) -> None:
        for name, value in values.items():
            setattr(frame.tensors[place], name, value)

    return change


def shorter(frame: pb.Frame) -> None:
    frame.payload = frame.payload[:-1]


def drop_mask(frame: pb.Frame) -> None:
    frame.payload = frame.payload[: -frame.tensors[1].shape[0] * frame.tensors[1].shape[1]]
    del frame.tensors[1]


NAN, INFINITE = b"\x00\x00\xc0\x7f", b"\x00\x00\x80\x7f"
# what is done to a good FORWARD, and the code it is answered with
BAD: dict[str, tuple[str, Callable[[pb.Frame], None]]] = {
    "NaN": ("W607", spoil(8, NAN)),
    "infinite": ("W607", spoil(0, INFINITE)),
    "a mask of 7": ("W607", spoil(2 * 5 * WIDTH * 4, b"\x07")),
    "1 GB": ("W606", claim(1, 16384, 16384)),
    "1 GB and a whole part": ("W606", claim(16, 1024, 16384, payload=CHUNK)),
    "more than there are": ("W606", claim(2**32 - 1, 2**32 - 1, 2**32 - 1)),
    "no rows": ("W606", claim(0, 5, WIDTH)),
    "one side": ("W603", claim(160)),
    "nine sides": ("W603", claim(2, 5, WIDTH, 1, 1, 1, 1, 1, 1)),
    "other shape": ("W601", claim(2, 6, WIDTH)),
    "another width": ("W603", claim(2, WIDTH, 5)),
    "unknown number": ("W603", header(0, number=42)),
    "no number": ("W603", header(0, number=0)),
    "unknown role": ("W601", header(0, role=99)),
    "last role": ("W603", header(1, role=99)),
    "twice the same role": ("W601", header(1, role=pb.ROLE_HIDDEN)),
    "a float mask": ("W603", header(1, number=pb.NUMBER_FLOAT16)),
    "a group": ("W603", header(0, group=4)),
    "truncated": ("W601", shorter),
    "nothing": ("W601", field(payload=b"")),
    "second part first": ("W601", field(part=1)),
    "a far part": ("W601", field(part=2**32 - 1)),
    "no mask": ("W603", drop_mask),
    "a gradient in a FORWARD": ("W603", header(1, role=pb.ROLE_GRADIENT, number=pb.NUMBER_UINT8)),
    "a row that is not there": ("W603", field(row=6)),
    "unknown kind": ("W601", field(kind=77)),
    "no kind": ("W601", field(kind=0)),
    "an answer": ("W601", field(kind=pb.FRAME_ACTIVATION)),
    "a BACKWARD without gradient": ("W603", field(kind=pb.FRAME_BACKWARD)),
    "a lean BACKWARD of nothing": ("W603", field(kind=pb.FRAME_BACKWARD, digest=b"12345678")),
}


@pytest.mark.parametrize("name", BAD)
def test_each_bad_frame_has_its_answer_and_the_next_good_one_too(name: str) -> None:
    code, change = BAD[name]
    service = served()
    stream = opened(near(service), masked=True)
    assert stream.channel is not None
    frame = micro(5)
    change(frame)
    stream.channel.send(frame.SerializeToString())
    answer = pb.Frame.FromString(stream.channel.receive())
    assert (answer.kind, answer.sequence, answer.failure.code) == (pb.FRAME_ERROR, 5, code)
    stream.channel.send(micro(6).SerializeToString())
    assert pb.Frame.FromString(stream.channel.receive()).kind == pb.FRAME_ACTIVATION
    assert service.live == 0 and service.errors == {code: 1}


def test_samples_that_nobody_sent_are_missing_and_do_not_cost() -> None:
    service = served()
    stream = opened(near(service), cache=True)
    assert stream.channel is not None
    stream.channel.send(pb.Frame(kind=pb.FRAME_FORWARD, sequence=1, samples=range(1000)).SerializeToString())
    answer = pb.Frame.FromString(stream.channel.receive())
    assert answer.failure.code == "S713" and len(answer.failure.samples) == 1000


def test_more_in_flight_than_granted_is_refused() -> None:
    """The service computes nothing here until asked, so eight wait; the ninth is told so."""
    service = served(Terms(credits=8))
    connection = service.connect()
    stream = opened(near(service))
    connection.receive(pb.Frame(kind=pb.FRAME_HELLO, hello=stream.hello).SerializeToString())
    for number in range(9):
        connection.receive(micro(number).SerializeToString())
    messages = [pb.Frame.FromString(connection.next(0) or b"") for _ in range(2)]
    assert [message.kind for message in messages] == [pb.FRAME_HELLO, pb.FRAME_ERROR] and messages[
        1
    ].failure.code == "S715"
    assert service.live == 8


def hello_of(stream: Any, **changes: Any) -> bytes:
    hello = pb.Hello()
    hello.CopyFrom(stream.hello)
    for name, value in changes.items():
        setattr(hello, name, value)
    return pb.Frame(kind=pb.FRAME_HELLO, hello=hello).SerializeToString()


def thousand(stream: Any) -> list[bytes]:
    """Bad messages of every sort, HELLOs of strangers among them, in a shuffled order that is always the
    same."""
    draw, messages = random.Random(0), []
    for number in range(1000 - 200):
        frame = micro(100 + number)
        list(BAD.values())[number % len(BAD)][1](frame)
        messages.append(frame.SerializeToString())
    for number in range(100):
        messages.append(micro(7, value=2.0 + number).SerializeToString())  # 7 was said with ones
        messages.append(bytes(draw.randrange(1, 256) for _ in range(draw.randrange(1, 2000))))
    draw.shuffle(messages)
    return messages


def test_a_thousand_bad_frames_over_a_socket() -> None:
    """All on one stream, which then goes on to train; another client trains meanwhile as if nothing were."""
    with listening() as (service, dial):
        stream, other = opened(dial, 0, masked=True), opened(dial, 1)
        channel = stream.channel
        assert channel is not None
        channel.send(micro(7).SerializeToString())
        assert pb.Frame.FromString(channel.receive()).kind == pb.FRAME_ACTIVATION
        codes: Counter[str] = Counter()
        memory = []
        for _ in range(2):
            for message in thousand(stream):
                channel.send(message)
                answer = pb.Frame.FromString(channel.receive())
                assert (
                    answer.kind == pb.FRAME_ERROR
                    and answer.failure.code in CATALOGUE
                    and answer.failure.advice
                )
                codes[answer.failure.code] += 1
            gc.collect()
            memory.append(psutil.Process().memory_info().rss)
        assert codes.total() == 2000 and codes["S717"] == 200 and min(codes.values()) > 10
        assert memory[1] - memory[0] < 8 << 20 and service.live == 0 and service.held.size == 0
        assert run(other)[0] == run(None)[0]
        model = Model()
        assert len(split_step(model, stream, batches(3))) == 3
        for each in (stream, other):
            each.close()


def mutated(draw: random.Random, message: bytes) -> bytes:
    """One to three bytes flipped, removed or put in, mostly where the headers are."""
    data = bytearray(message)
    for _ in range(draw.randint(1, 3)):
        at = draw.randrange(min(len(data), 120) if draw.random() < 0.8 else len(data))
        match draw.randrange(3):
            case 0:
                data[at] ^= 1 << draw.randrange(8)
            case 1:
                del data[at : at + draw.randint(1, 20)]
            case _:
                data[at:at] = draw.randbytes(draw.randint(1, 5))
    return bytes(data) or b"x"


@pytest.mark.parametrize("wishes", [{}, {"lean": True, "cache": True}], ids=["stateless", "lean"])
def test_three_thousand_mutations_meet_no_defect(wishes: dict[str, Any]) -> None:
    """Every message is answered once, by an error with a code or by a result; S714 would be an exception that
    nobody foresaw."""
    draw, service, codes = random.Random(1), served(), Counter[str]()
    stream = opened(near(service), **wishes)
    for number in range(3000):
        if stream.channel is None or stream.channel.connection.closed:  # type: ignore[attr-defined]  # a mutation made it a BYE
            stream = opened(near(service), **wishes)
        frame = micro(
            number, mask=draw.random() < 0.5, kind=draw.choice([pb.FRAME_FORWARD, pb.FRAME_BACKWARD])
        )
        frame.samples.extend([1, 2])
        message = mutated(draw, frame.SerializeToString())
        connection = stream.channel.connection  # type: ignore[union-attr]
        connection.receive(message)
        service.merger.step()
        answers = [pb.Frame.FromString(answer) for answer in iter(lambda c=connection: c.next(0), None)]
        codes.update(answer.failure.code or pb.FrameKind.Name(answer.kind) for answer in answers)
        assert len(answers) == 1 or pb.Frame.FromString(message).kind in (pb.FRAME_CREDIT, pb.FRAME_BYE)
    assert (
        "S714" not in codes
        and service.live == 0
        and {"W601", "W603", "W607", "FRAME_GRADIENT"} <= codes.keys()
    )


@pytest.mark.parametrize(
    ("code", "changes"),
    [
        ("S712", {"token": "0" * 64}),
        ("S712", {"token": ""}),
        ("S712", {"token": "\u0000é"}),
        ("S712", {"client": -5}),
        ("S712", {"session": "../../etc"}),
        ("W602", {"version": 2}),
        ("S702", {"part": ""}),
        ("S702", {"width": 0}),
        ("W603", {"number": pb.NUMBER_UINT8}),
        ("W603", {"group": 1 << 30, "number": pb.NUMBER_INT8}),
    ],
)
def test_a_bad_hello_is_answered_and_a_good_one_may_follow(code: str, changes: dict[str, Any]) -> None:
    with listening() as (service, dial):
        stream = opened(dial)
        channel = Socket(dial.address)
        for _ in range(20):
            channel.send(hello_of(stream, **changes))
            assert pb.Frame.FromString(channel.receive()).failure.code == code
        channel.send(hello_of(stream, session="0" * 32))
        assert pb.Frame.FromString(channel.receive()).kind == pb.FRAME_HELLO
        assert set(service.sessions) == {"0" * 32}  # a client has one session: its earlier one has made room
        channel.close()


def test_one_who_sends_and_never_reads_is_read_no_further() -> None:
    """Errors pile up to a bound; then the service stops reading that stream, and the others' answers come as
    ever."""
    with listening() as (service, dial):
        flood, other = Socket(dial.address), opened(dial, 1)
        for _ in range(20_000):
            flood.send(b"\xff" * 100)
        time.sleep(0.5)
        waiting = max(len(connection.waiting) for connection in service.connections)
        assert waiting <= 256
        assert run(other)[0] == run(None)[0]
        flood.call.cancel()
        other.close()


@pytest.mark.slow
def test_a_step_of_two_minutes_survives_the_pings() -> None:
    """The real intervals: pings every 20 s on a stream that is silent otherwise. A server with gRPC's own
    settings ends it, ours does not."""

    class Slow(PlainBody):
        def forward(self, hidden: torch.Tensor, side: Side) -> torch.Tensor:
            time.sleep(130)
            return super().forward(hidden, side)

    def one_step(address: str) -> str:
        channel = Socket(address, beat=1000)
        stream = opened(lambda: channel, patience=0.0)
        stream.forward(Micro(torch.ones(1, 4, WIDTH)))
        try:
            channel.receive()
        except Broken as broken:
            return str(broken)
        return "answered"

    with listening(Terms(lease=300), body=Slow()) as (_, dial), ThreadPoolExecutor(2) as pool:
        calm = served(Terms(lease=300), body=Slow()).start()
        server = grpc.server(ThreadPoolExecutor(4))
        server.add_generic_rpc_handlers((handler(calm),))
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        ours, default = pool.map(one_step, (dial.address, f"127.0.0.1:{port}"))
        calm.stop()
        server.stop(0)
    assert ours == "answered" and "Too many pings" in default


def test_the_service_takes_pings_of_its_clients_every_twenty_seconds() -> None:
    """A server that allows fewer answers ENHANCE_YOUR_CALM and ends the stream during a long step."""
    options = dict(OPTIONS)
    assert (
        options["grpc.http2.min_ping_interval_without_data_ms"] < options["grpc.keepalive_time_ms"]
        and options["grpc.keepalive_permit_without_calls"]
    )

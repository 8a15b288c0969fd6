"""Who is admitted, how long a session lives, what is held for whom, and several clients at once."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch

from fedtune.errors import FedtuneError
from fedtune.split.batching import Merging
from fedtune.split.channel import Socket
from fedtune.split.codec import Coding
from fedtune.split.cut import Side
from fedtune.split.grpc_server import local
from fedtune.split.micro import Micro, Wishes
from fedtune.split.service import Terms
from fedtune.split.session import HeldSamples
from fedtune.split.stream import Stream
from fedtune.wire.v1 import split_pb2 as pb
from tests.split.plain import (
    OFFER,
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
    turn,
)
from tests.waiting import PATIENCE


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def until(true: Any, seconds: float = PATIENCE) -> bool:
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.02)
    return bool(true())


# --- admission ---


@pytest.mark.parametrize(
    ("code", "offer", "who"),
    [
        ("S712", {}, {"token": "wrong"}),
        ("S712", {}, {"round": 2}),  # a token of another round
        ("S712", {}, {"client": 1}),
        ("S712", {}, {"run": "another"}),
        ("S702", {"part": "cd" * 32}, {}),  # another revision of the model
        ("S702", {"first": 2, "last": 4}, {}),  # other layers
        ("S702", {"width": 8}, {}),
        ("S702", {"model": "other"}, {}),
    ],
)
def test_who_does_not_fit_is_told_why(code: str, offer: dict[str, Any], who: dict[str, Any]) -> None:
    with pytest.raises(FedtuneError, match=code):
        Stream(near(served()), replace(OFFER, **offer), replace(turn(), **who), Wishes(Coding("fp32")))


def test_no_more_sessions_than_agreed_but_always_ones_own() -> None:
    """A client that starts again takes its own place; its first stream is over."""
    service = served(Terms(sessions=2))
    first, _ = opened(near(service), 0), opened(near(service), 1)
    with pytest.raises(FedtuneError, match="S712: found 2 sessions"):
        opened(near(service), 2)
    again = opened(near(service), 0)
    assert first.channel is not None and first.channel.connection.closed  # type: ignore[attr-defined]
    assert len(run(again)[0]) == 12


def test_an_address_of_this_machine() -> None:
    assert all(map(local, ["127.0.0.1:5", "127.8.8.8:5", "localhost:5", "[::1]:5", "unix:/tmp/x"]))
    assert not any(map(local, ["0.0.0.0:5", "[::]:5", "10.0.0.1:5", "localhost.example.org:5"]))


# --- numbers ---


def test_a_number_said_twice_gets_the_same_answer_and_with_other_bytes_none() -> None:
    service, seen = served(), []
    stream = opened(near(service))
    micro = Micro(torch.ones(1, 4, WIDTH))
    number = stream.forward(micro)
    seen.append(stream.answer().value)
    flight = stream.flights[number]
    flight.waits = True
    stream.say(number, flight)
    seen.append(stream.answer().value)
    assert torch.equal(*seen) and service.merger.counts.jobs == 2
    flight.micro = Micro(torch.ones(1, 4, WIDTH) * 2)
    stream.fill(flight)
    flight.waits = True
    stream.say(number, flight)
    with pytest.raises(FedtuneError, match="S717: found other bytes than before under number 1"):
        stream.answer()
    stream.forward(micro)
    assert torch.equal(stream.answer().value, seen[0])  # and the stream goes on


@pytest.mark.parametrize("lean", [False, True])
def test_a_gradient_under_another_number_is_refused(lean: bool) -> None:
    stream = opened(near(served()), lean=lean)
    one, two = (stream.forward(Micro(torch.ones(1, 4, WIDTH) * n)) for n in (1, 2))
    for _ in range(2):
        stream.answer()
    stream.flights[one], stream.flights[two] = stream.flights[two], stream.flights[one]
    stream.backward(one, torch.ones(1, 4, WIDTH))
    with pytest.raises(FedtuneError, match="S717"):
        stream.answer()


@pytest.mark.parametrize(
    ("wishes", "side"),
    [
        ({"masked": True}, Side()),
        ({"positioned": True}, Side(torch.ones(1, 4))),
        ({}, Side(torch.ones(1, 5))),
        ({}, Side(torch.full((1, 4), 2))),
    ],
)
def test_a_side_that_is_missing_or_does_not_fit_is_refused(wishes: dict[str, Any], side: Side) -> None:
    stream = opened(near(served()), **wishes)
    stream.forward(Micro(torch.ones(1, 4, WIDTH), side))
    with pytest.raises(FedtuneError, match=r"W603|W607"):
        stream.answer()


# --- holding ---


def test_whoever_holds_most_gives_way_first() -> None:
    held = HeldSamples(100, 60)
    for number in range(9):
        held.put("greedy", number, number, 10)
    held.put("modest", 0, "x", 10)
    held.put("modest", 1, "y", 20)
    assert (
        held.get("greedy", range(9)) == [None, None, *range(2, 9)]
        and held.get("modest", [0, 1]) == ["x", "y"]
        and held.size == 100
    )
    held.put("modest", 2, "far too large", 101)
    assert held.get("modest", [2]) == [None]
    held.drop("greedy")
    assert held.size == 30


def test_what_is_held_ends_with_its_time() -> None:
    held = HeldSamples(100, 0.05)
    held.put("client", 1, "x", 10)
    time.sleep(0.06)
    assert held.get("client", [1]) == [None] and held.size == 10
    held.sweep()
    assert held.size == 0


def test_samples_of_one_client_are_not_another_ones() -> None:
    service, sent = served(), []
    for client in (0, 1):
        stream = opened(near(service), client, cache=True)
        stream.forward(Micro(torch.ones(1, 4, WIDTH) * (client + 1), samples=[7]))
        sent.append(stream.answer().value)
    stream = opened(near(service), 0, cache=True)
    stream.held.add(7)
    stream.forward(Micro(lambda: pytest.fail("asked for what is held"), samples=[7]))
    assert torch.equal(stream.answer().value, sent[0])


# --- several clients ---


def test_eight_clients_at_once_get_what_each_gets_alone() -> None:
    """Concurrent streams on a real socket, merged: parameters equal those of eight runs without a cut, to the
    bit."""
    alone = [run(None, seed=client) for client in range(8)]
    with listening(merging=Merging(padding=0, wait=0.01)) as (service, dial), ThreadPoolExecutor(8) as pool:
        streams = [opened(dial, client) for client in range(8)]
        models = [Model() for _ in range(8)]  # here: torch's seed is one for all threads
        together = list(
            pool.map(lambda client: run(streams[client], seed=client, model=models[client]), range(8))
        )
        counts = service.merger.counts
        assert counts.jobs == 8 * 3 * 4 * 2 and counts.passes < 0.7 * counts.jobs
        for stream in streams:
            stream.close()
        assert until(lambda: not service.sessions)
    for (losses, values), (wanted, parameters) in zip(together, alone, strict=True):
        assert losses == wanted and all(torch.equal(a, b) for a, b in zip(values, parameters, strict=True))


def test_a_body_that_fails_on_one_micro_batch_serves_the_next() -> None:
    body = PlainBody()
    real, failing = body.forward, threading.Event()

    def forward(hidden: torch.Tensor, side: Side) -> torch.Tensor:
        if failing.is_set():
            raise RuntimeError("CUDA out of memory")
        return real(hidden, side)

    body.forward = forward  # type: ignore[method-assign]
    with listening(body=body) as (_, dial):
        stream = opened(dial)
        failing.set()
        number = stream.forward(Micro(torch.ones(1, 4, WIDTH)))
        with pytest.raises(FedtuneError, match="S714: the body failed with RuntimeError: CUDA out of memory"):
            stream.answer()
        failing.clear()
        stream.done(number)
        assert len(split_step(PlainBody().model, stream, batches(2))) == 2
        stream.close()


# --- leases ---


def test_a_client_that_says_nothing_is_freed_and_one_that_is_slow_is_not() -> None:
    """A lease of a second. The silent one's sign of life is switched off; the slow one's comes every 0.1
    s."""
    with listening(Terms(lease=1.0)) as (service, dial):
        silent = opened(lambda: Socket(dial.address, beat=1000), 0, lean=True)
        slow = opened(lambda: Socket(dial.address, beat=0.1), 1, lean=True)
        for stream in (silent, slow):
            stream.forward(Micro(torch.ones(1, 4, WIDTH)))
            stream.answer()
        assert service.held.size > 0 and len(service.sessions) == 2
        assert until(lambda: len(service.sessions) == 1)
        time.sleep(1.2)
        (left,) = service.sessions.values()
        assert (
            left.hello.client == 1
            and left.connection is not None
            and set(service.held.entries) == {slow.hello.session}
        )
        assert len(split_step(PlainBody().model, slow, batches(2))) == 2
        # the silent one is not lost either: it notices, and comes back
        assert len(split_step(PlainBody().model, silent, batches(2))) == 2


def test_who_comes_back_to_a_smaller_share_is_greeted_first() -> None:
    service = served(Terms(credits=8, together=8))
    stream = opened(near(service), 0, window=8)
    assert stream.window == 8 and stream.channel is not None
    stream.channel.close()
    opened(near(service), 1, window=8)
    assert len(split_step(PlainBody().model, stream, batches(2))) == 2 and stream.window == 4


def test_without_memory_nothing_is_promised() -> None:
    service = served(Terms(memory=0))
    stream = opened(near(service), lean=True, cache=True)
    assert (stream.lean, stream.cache) == (False, False)
    assert run(stream)[0] == run(None)[0] and not service.errors


def test_a_defect_of_the_service_is_an_error_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is raised, in the thread that reads or in the one that computes, the stream and the service go
    on."""
    from fedtune.split import service as module

    with listening() as (_, dial):
        stream = opened(dial)
        for name in ("prepared", "encode"):
            with monkeypatch.context() as patched:
                patched.setattr(module, name, lambda *_: 1 / 0)
                number = stream.forward(Micro(torch.ones(1, 4, WIDTH)))
                with pytest.raises(FedtuneError, match="S714: the body failed with ZeroDivisionError"):
                    stream.answer()
                stream.done(number)
        assert run(stream)[0] == run(None)[0]
        stream.close()


def test_where_too_much_waits_streams_are_read_no_further() -> None:
    """Micro-batches of 64 KiB, room for 128: of sixteen that four clients send at once, two wait and at most
    one more of each; all are answered."""
    body, most, gate = PlainBody(), 0, threading.Event()
    real = body.forward

    def forward(hidden: torch.Tensor, side: Side) -> torch.Tensor:
        gate.wait(PATIENCE)
        return real(hidden, side)

    body.forward = forward  # type: ignore[method-assign]
    with listening(Terms(waiting=128 << 10), None, body) as (service, dial):
        streams = [opened(dial, client) for client in range(4)]
        for stream in streams:
            for _ in range(4):
                stream.forward(Micro(torch.ones(16, 64, WIDTH)))
        assert until(lambda: service.merger.waiting >= 128 << 10)
        time.sleep(0.3)
        most = service.merger.waiting
        gate.set()
        for stream in streams:
            for _ in range(4):
                assert stream.answer().value.shape == (16, 64, WIDTH)
            stream.close()
        assert (128 << 10) <= most <= (128 + 4 * 64) << 10 and service.merger.waiting == 0


def test_a_second_hello_and_a_frame_before_it() -> None:
    service = served()
    connection = service.connect()
    connection.receive(pb.Frame(kind=pb.FRAME_FORWARD, sequence=3).SerializeToString())
    frame = pb.Frame.FromString(connection.next(0) or b"")
    assert (frame.kind, frame.sequence, frame.failure.code) == (pb.FRAME_ERROR, 3, "S712")
    stream = opened(near(service))
    assert stream.channel is not None
    stream.channel.send(pb.Frame(kind=pb.FRAME_HELLO, hello=stream.hello).SerializeToString())
    with pytest.raises(FedtuneError, match="S712: found a second HELLO"):
        stream.answer()

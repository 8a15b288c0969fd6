"""A client and the body service: the same numbers as the whole model, on a socket or in one process, and the
bytes that the formula says."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch

from fedtune.errors import FedtuneError
from fedtune.split.channel import Broken, Channel
from fedtune.split.codec import Coding, size_of
from fedtune.split.micro import Micro
from fedtune.split.pipeline import infer
from fedtune.split.service import Terms
from fedtune.wire.v1 import split_pb2 as pb
from tests.split.plain import (
    Model,
    batches,
    listening,
    near,
    opened,
    run,
    served,
    split_step,
)

ROWS, LENGTH, MICROS = 4, 61, 4


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def equal(a: tuple[list[float], list[torch.Tensor]], b: tuple[list[float], list[torch.Tensor]]) -> bool:
    return a[0] == b[0] and all(torch.equal(x, y) for x, y in zip(a[1], b[1], strict=True))


@pytest.mark.parametrize(
    "wishes", [{}, {"lean": True}, {"window": 1}, {"masked": True, "positioned": True}], ids=str
)
def test_training_over_a_socket_and_in_one_process_equals_the_whole_model(wishes: dict[str, Any]) -> None:
    oracle = run(None)
    stream = opened(near(served()), **wishes)
    assert equal(run(stream), oracle)
    with listening() as (service, dial):
        remote = opened(dial, **wishes)
        assert equal(run(remote), oracle)
        remote.close()
        assert (remote.sent, remote.received) == (stream.sent + 2, stream.received)  # and BYE
        assert not service.errors and service.live == 0 and service.held.size == 0


@pytest.mark.parametrize(
    ("coding", "most"), [(Coding("fp16"), 1e-3), (Coding("bf16"), 5e-3), (Coding("int8", 16), 1e-2)]
)
def test_a_coarser_coding_is_close(coding: Coding, most: float) -> None:
    (losses, _), (wanted, _) = run(opened(near(served()), coding=coding)), run(None)
    assert 0 < max(abs(a - b) for a, b in zip(losses, wanted, strict=True)) < most


# --- slim ---


def test_without_its_consent_nothing_of_a_client_is_held() -> None:
    service = served()
    seen: list[int] = []
    real = service.held.put
    service.held.put = lambda *args: (seen.append(1), real(*args))[1]  # type: ignore[method-assign]
    run(opened(near(service)))
    assert not seen


# --- window, order, evaluation ---


def test_no_more_micro_batches_are_in_flight_than_were_granted() -> None:
    service = served(Terms(credits=2))
    stream = opened(near(service), window=8)
    assert stream.window == 2
    most, put = 0, service.merger.submit

    def submit(job: Any) -> None:
        nonlocal most
        put(job)
        most = max(most, service.live)

    service.merger.submit = submit  # type: ignore[method-assign]
    run(stream, micros=8)
    assert most == 2


def test_the_window_is_shared_among_those_who_are_there() -> None:
    """8 in all: the first gets 8, with a second each has 4, and 8 again when it is gone."""
    service = served(Terms(credits=8, together=8))
    first = opened(near(service), 0, window=8)
    second = opened(near(service), 1, window=8)
    assert (first.window, second.window) == (8, 4)
    run(first, steps=1)
    assert first.window == 4
    second.close()
    run(first, steps=1)
    assert first.window == 8


def test_answers_in_another_order_give_the_same_sums() -> None:
    class Shuffled:
        """A channel whose answers come in pairs the wrong way round."""

        def __init__(self, inner: Channel) -> None:
            self.inner, self.kept = inner, list[bytes]()
            self.sent = self.received = 0

        def send(self, message: bytes) -> None:
            self.inner.send(message)

        def receive(self) -> bytes:
            if not self.kept:
                self.kept.append(self.inner.receive())
                with contextlib.suppress(Broken):
                    self.kept.append(self.inner.receive())
            return self.kept.pop()

        def close(self) -> None:
            self.inner.close()

    stream = opened(near(served(merging=None)))
    stream.channel = Shuffled(stream.channel)  # type: ignore[arg-type]
    assert equal(run(stream), run(None))


def test_evaluation_brings_activations_in_order() -> None:
    model, todo, seen = Model(), batches(6), []
    with listening() as (service, dial):
        stream = opened(dial)
        infer(
            stream,
            todo,
            lambda b: Micro(model.head(b[0], b[1]), b[1]),
            lambda b, hidden: seen.append((b, hidden)),
        )
        assert service.merger.counts.jobs == 6 and not stream.flights
        stream.close()
    assert all(
        torch.equal(hidden, model.body(model.head(b[0], b[1]), b[1])) and b is todo[i]
        for i, (b, hidden) in enumerate(seen)
    )


def test_a_frozen_head_needs_no_gradient() -> None:
    model = Model()
    model.prompts.requires_grad_(False)
    service = served()
    split_step(model, opened(near(service)), batches(4))
    assert service.merger.counts.jobs == 4 and model.tail.weight.grad is not None


# --- what arrives is what was sent ---


@pytest.mark.parametrize("change", ["mask", "positions", "sequence", "answer"])
def test_a_message_changed_under_way_is_caught(change: str) -> None:
    """A mask dropped, positions shifted, two numbers swapped, an answer to another micro-batch: each ends the
    step with a sentence."""

    class Spoiled:
        def __init__(self, inner: Channel) -> None:
            self.inner, self.sent, self.received = inner, 0, 0

        def send(self, message: bytes) -> None:
            frame = pb.Frame.FromString(message)
            if change == "mask":
                self.drop(frame, pb.ROLE_MASK)
            elif change == "positions":
                self.drop(frame, pb.ROLE_POSITIONS, shift=True)
            elif change == "sequence" and frame.sequence:
                frame.sequence += 1 if frame.sequence % 2 else -1
            self.inner.send(frame.SerializeToString())

        def drop(self, frame: pb.Frame, role: int, shift: bool = False) -> None:
            at = 0
            for place, header in enumerate(frame.tensors):
                size = size_of(header)
                if header.role == role:
                    values = (
                        torch.frombuffer(
                            bytearray(frame.payload[at : at + size]),
                            dtype=torch.int32 if shift else torch.uint8,
                        )
                        + 1
                    )
                    frame.payload = (
                        frame.payload[:at]
                        + (bytes(values.numpy().data) if shift else b"")
                        + frame.payload[at + size :]
                    )
                    if not shift:
                        del frame.tensors[place]
                    return
                at += size

        def receive(self) -> bytes:
            frame = pb.Frame.FromString(self.inner.receive())
            if change == "answer" and frame.sequence:
                frame.sequence += 1 if frame.sequence % 2 else -1
            return frame.SerializeToString()

        def close(self) -> None:
            self.inner.close()

    stream = opened(near(served()))
    stream.channel = Spoiled(stream.channel)  # type: ignore[arg-type]
    with pytest.raises(FedtuneError, match="S717"):
        run(stream)


# --- TLS ---

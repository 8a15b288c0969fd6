"""Answers are written beside the thread that computes: in order, few at a time, and on a GPU behind their pass alone."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fedtune.split import service as services
from fedtune.split.cut import Side
from fedtune.split.micro import Micro
from fedtune.split.writer import ROOM, Writer
from tests.split.plain import WIDTH, PlainBody, listening, opened
from tests.waiting import PATIENCE


def test_answers_leave_in_order_and_few_wait() -> None:
    writer, gate, written, given = Writer(), threading.Event(), list[int](), list[int]()

    def give() -> None:
        for number in range(5):
            writer.later(None, lambda number=number: (gate.wait(PATIENCE), written.append(number)))  # type: ignore[misc]
            given.append(number)

    giving = threading.Thread(target=give)
    giving.start()
    giving.join(0.3)
    assert len(given) == ROOM and not written  # the third finds no room while the first is being written
    gate.set()
    giving.join(PATIENCE)
    writer.stop()
    assert written == [0, 1, 2, 3, 4]


def test_the_next_pass_is_computed_while_an_answer_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first answer is not coded before the body has been asked for the second one."""
    body, second, threads = PlainBody(), threading.Event(), dict[str, set[int]](body=set(), codec=set())
    real, encode = body.forward, services.encode

    def forward(hidden: torch.Tensor, side: Side) -> torch.Tensor:
        threads["body"].add(threading.get_ident())
        if hidden.shape[1] == 5:
            second.set()
        return real(hidden, side)

    def encoded(role: Any, value: torch.Tensor, coding: Any) -> Any:
        threads["codec"].add(threading.get_ident())
        assert second.wait(PATIENCE)
        return encode(role, value, coding)

    body.forward = forward  # type: ignore[method-assign]
    monkeypatch.setattr(services, "encode", encoded)
    with listening(body=body) as (_, dial):
        stream = opened(dial)
        for tokens in (4, 5):
            stream.forward(Micro(torch.ones(1, tokens, WIDTH)))
        assert [stream.answer().value.shape[1] for _ in range(2)] == [4, 5]
        stream.close()
    assert len(threads["body"]) == len(threads["codec"]) == 1 and threads["body"] != threads["codec"]


def test_on_a_gpu_it_waits_for_the_pass_on_a_stream_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that is pretended, and says what it was asked."""
    said: list[str] = []

    class Stream:
        def __init__(self, device: Any) -> None:
            said.append(f"stream on {device}")

        def wait_event(self, event: str) -> None:
            said.append(f"wait for {event}")

    @contextmanager
    def on(stream: Stream) -> Any:
        said.append("on")
        yield
        said.append("off")

    passes = SimpleNamespace(record_event=lambda: "the pass")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: passes)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", on)
    result: Any = SimpleNamespace(
        is_cuda=True, device="cuda:0", record_stream=lambda stream: said.append("kept for it")
    )
    writer = Writer()
    for number in (1, 2):
        writer.later(result, lambda number=number: said.append(f"write {number}"))  # type: ignore[misc]
    writer.stop()
    turns = [["on", "wait for the pass", f"write {number}", "kept for it", "off"] for number in (1, 2)]
    assert said == ["stream on cuda:0", *turns[0], *turns[1]]

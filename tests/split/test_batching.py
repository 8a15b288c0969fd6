"""Several clients' micro-batches in one pass: the same results as alone, fair turns, no waiting when nobody
else is there."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from fedtune.split import batching
from fedtune.split.batching import Job, Merger, Merging
from fedtune.split.body import Body, Frozen
from fedtune.split.cut import Cut, Side
from fedtune.split.parts import Part
from tests.split.families import make
from tests.split.plain import WIDTH, PlainBody


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


class Asked:
    """Jobs of many sessions, and what came back."""

    def __init__(self, merging: Merging | None, body: Body | None = None) -> None:
        self.body = body or PlainBody()
        self.merger, self.results, self.order = Merger(self.body, merging), {}, []

    def ask(
        self,
        session: str,
        rows: int,
        length: int,
        masked: bool = True,
        backward: bool = False,
        seed: int = 0,
        width: int = WIDTH,
    ) -> None:
        draw = torch.Generator().manual_seed(seed)
        hidden, grad = (torch.randn(rows, length, width, generator=draw) for _ in range(2))
        mask = torch.ones(rows, length, dtype=torch.uint8)
        mask[-1, length // 2 :] = 0
        side, name = Side(mask if masked else None), (session, len(self.results))
        self.results[name] = None
        alone = self.body.backward(hidden, side, grad) if backward else self.body.forward(hidden, side)

        def done(result: torch.Tensor | None, error: Exception | None) -> None:
            self.results[name] = error or float((result - alone).abs().max())
            self.order.append(session)

        self.merger.submit(Job(session, hidden, side, grad if backward else None, done))

    def all(self) -> None:
        while self.merger.step():
            pass


@pytest.mark.parametrize("backward", [False, True])
def test_equal_lengths_are_one_pass_with_the_bits_of_many(backward: bool) -> None:
    asked = Asked(Merging(wait=0))
    for number in range(8):
        asked.ask(f"client {number}", 1 + number % 3, 32, backward=backward, seed=number)
    asked.all()
    assert asked.merger.counts.passes == 1 and asked.merger.counts.jobs == 8
    assert set(asked.results.values()) == {0.0}


@pytest.mark.parametrize("backward", [False, True])
def test_close_lengths_are_padded_and_rows_do_not_mix(backward: bool) -> None:
    """Lengths 32 and 28: 8 of 128 places are padding. With length 8 it would be 56 of 192, more than a
    quarter: another pass."""
    asked = Asked(Merging(wait=0))
    for number, length in enumerate([32, 28, 8]):
        asked.ask(f"client {number}", 2, length, backward=backward, seed=number)
    asked.all()
    assert asked.merger.counts.passes == 2 and asked.merger.counts.padding == 2 * 4
    assert max(asked.results.values()) <= 1e-6


@pytest.mark.parametrize("name", ["llama", "qwen3 sliding", "gpt2", "bert"])
def test_real_models_merged_with_padding_answer_as_alone(name: str) -> None:
    """Four clients' texts of 10 to 12 tokens in one pass; sliding windows and positions are the model's
    own."""
    body = Frozen(Part(make(name), Cut(1, 3)))
    asked = Asked(Merging(wait=0), body)
    for number, length in enumerate([12, 11, 10, 12]):
        for backward in (False, True):
            asked.ask(f"client {number}", 2, length, backward=backward, seed=number, width=32)
    asked.all()
    assert asked.merger.counts.passes == 2 and max(asked.results.values()) <= 1e-6 * 32


def test_without_padding_bits_do_not_depend_on_the_others() -> None:
    asked = Asked(Merging(padding=0, wait=0))
    for number, length in enumerate([32, 28, 32, 28]):
        asked.ask(f"client {number}", 2, length, seed=number)
    asked.all()
    assert asked.merger.counts.passes == 2 and set(asked.results.values()) == {0.0}


def test_what_has_no_mask_is_never_padded_nor_mixed_with_what_has_one() -> None:
    asked = Asked(Merging(wait=0))
    for number, (length, masked) in enumerate([(32, False), (30, False), (32, True), (32, False)]):
        asked.ask(f"client {number}", 1, length, masked=masked, seed=number)
    asked.all()
    assert asked.merger.counts.passes == 3 and set(asked.results.values()) == {0.0}


def test_a_pass_has_at_most_its_tokens() -> None:
    """8 jobs of 4 x 32 tokens at most 512 a pass: two passes of four."""
    asked = Asked(Merging(tokens=512, wait=0))
    for number in range(8):
        asked.ask(f"client {number}", 4, 32, seed=number)
    asked.all()
    assert asked.merger.counts.passes == 2


def test_turns_are_fair() -> None:
    """One client brings 20 micro-batches before another brings 2; the second does not wait for all of the
    first."""
    asked = Asked(None)
    for _ in range(20):
        asked.ask("greedy", 1, 8)
    for _ in range(2):
        asked.ask("modest", 1, 8)
    asked.all()
    assert asked.order[:4] == ["greedy", "modest", "greedy", "modest"]
    merged = Asked(Merging(tokens=64, wait=0))
    for _ in range(20):
        merged.ask("greedy", 1, 8)
    for _ in range(2):
        merged.ask("modest", 1, 8)
    merged.all()
    assert merged.order[:8].count("modest") == 2


def test_one_client_alone_is_not_kept_waiting_and_two_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching, "TARDY", 30.0)
    asked = Asked(Merging(wait=60.0))
    began = time.monotonic()
    asked.ask("alone", 1, 8)
    asked.all()
    asked.ask("late", 1, 8)
    asked.ask("alone", 1, 8)
    asked.all()  # all who are known are here
    assert time.monotonic() - began < 30 and asked.merger.counts.passes == 2
    asked.ask("alone", 1, 8)
    threading.Timer(0.05, asked.ask, ("late", 1, 8)).start()
    asked.merger.step()
    assert asked.merger.counts.passes == 3 and asked.order[-2:] == ["alone", "late"]


def test_a_job_that_fails_fails_alone() -> None:
    asked = Asked(Merging(wait=0))
    real = asked.body.forward

    def picky(hidden: torch.Tensor, side: Side) -> torch.Tensor:
        if bool((hidden > 3).any()):
            raise RuntimeError("out of memory")
        return real(hidden, side)

    asked.body.forward = picky  # type: ignore[method-assign]
    draws = [
        seed
        for seed in range(60)
        if float(torch.randn(1, 8, WIDTH, generator=torch.Generator().manual_seed(seed)).max()) <= 3
    ]
    bad = next(seed for seed in range(60) if seed not in draws)
    asked.body.forward = real  # type: ignore[method-assign]
    for number, seed in enumerate([draws[0], bad, draws[1]]):
        asked.ask(f"client {number}", 1, 8, seed=seed)
    asked.body.forward = picky  # type: ignore[method-assign]
    asked.all()
    assert [isinstance(value, RuntimeError) for value in asked.results.values()] == [False, True, False]
    assert [value for value in asked.results.values() if isinstance(value, float)] == [0.0, 0.0]


def test_a_session_alone_is_computed_one_by_one() -> None:
    """So that its bits are those without a service; with another there, everything goes together."""
    asked = Asked(Merging(wait=0))
    for _ in range(3):
        asked.ask("alone", 1, 8)
    asked.merger.step()
    assert asked.merger.counts.jobs == 1
    asked.ask("other", 1, 8)
    asked.merger.step()
    assert asked.merger.counts.jobs == 4 and asked.merger.counts.passes == 2


def test_a_session_that_is_gone_is_forgotten() -> None:
    asked = Asked(Merging(wait=0))
    asked.ask("gone", 1, 8)
    asked.ask("here", 1, 8)
    asked.merger.forget("gone")
    asked.all()
    assert asked.order == ["here"] and asked.merger.counts.jobs == 1

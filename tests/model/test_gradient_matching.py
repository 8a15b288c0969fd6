"""Gradient matching finds the words of an update of one step, finds nothing in noise, and says which of the two it
was."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fedtune.model.encode import Encoded, encode
from fedtune.model.fit import fit
from fedtune.model.gradient_matching import Matched, along, closest, match
from fedtune.model.settings import TrainSettings
from fedtune.model.tunable import TunableModel, attach
from fedtune.model.update_inversion import Found, Moved, difference
from tests import tiny
from tests.tables import adapter_of


def attacked(base: Any, lr: float, steps: int) -> tuple[TunableModel, Encoded, Moved]:
    """LoRA after training on one row of two words, and back where it was."""
    rows = [{"text": " ".join(tiny.SENTENCES[0].split()[1:3]), "label": "a"}]
    data, tunable = encode(rows, base, max_length=16), attach(base, adapter_of(rank=8), 1)
    before = tunable.read()
    fit(tunable, data, TrainSettings(optimizer="sgd", lr=lr, steps=steps, batch=1), 5)
    moved = difference(tunable.read(), before)
    tunable.write(before)
    return tunable, data, moved


def test_one_step_of_one_row_says_its_words(workspace: Any) -> None:
    """What moved is minus the row's gradient: of all pairs of words the row's own agree best, wholly."""
    tunable, data, moved = attacked(workspace.base("encoder"), 0.1, 1)
    before = tunable.read()
    found = match(tunable, moved, data, 10, one_step=True)
    assert found.truth == pytest.approx(1.0, abs=1e-4)
    assert found.words.found == found.words.sought == 2 and found.guess == pytest.approx(1.0, abs=1e-4)
    assert all((tunable.read()[name] == value).all() for name, value in before.items())


def test_noise_and_nothing_say_no_words(workspace: Any) -> None:
    tunable, data, moved = attacked(workspace.base("encoder"), 0.1, 1)
    draw = torch.Generator().manual_seed(1)
    noise = {name: torch.randn(value.shape, generator=draw) for name, value in moved.items()}
    found = match(tunable, noise, data, 2, one_step=True)
    assert abs(found.truth) < 0.1
    still = {name: torch.zeros_like(value) for name, value in moved.items()}
    assert match(tunable, still, data, 2, one_step=True) == Matched(
        Found("gradient matching", 0, 2, found.words.chance), 0.0, 0.0
    )


def test_several_short_steps_are_read_halfway(workspace: Any) -> None:
    """At the start LoRA's A has no gradient, since B is zero; halfway it has that by which A has moved."""
    tunable, data, moved = attacked(workspace.base("encoder"), 0.05, 4)
    halfway, start = (match(tunable, moved, data, 1, one_step=one).truth for one in (False, True))
    assert halfway > 0.99 and halfway > start


def test_a_cosine_is_against_the_gradient_and_words_are_the_nearest() -> None:
    way = torch.tensor([3.0, 0.0, 4.0])
    assert float(along((-2 * way,), [way])) == pytest.approx(1.0)
    assert float(along((torch.tensor([0.0, 1.0, 0.0]),), [way])) == 0.0
    table = torch.tensor([[1.0, 0.0], [0.0, 1.0], [5.0, 5.0]])
    guess = torch.tensor([[[2.0, 0.1], [0.1, 2.0], [1.0, 1.1]]])
    assert closest(guess, table, torch.tensor([1])).tolist() == [[[0, 2], [2, 0], [2, 0]]]

"""The server's optimiser, carried as arrays from round to round, equals torch's that never stopped."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fedtune.model.server_optimizers import SERVER_OPTIMIZERS
from fedtune.model.server_step import outer_step
from fedtune.schema import digest

OPTIMIZERS: dict[str, tuple[dict[str, Any], Any]] = {
    "sgd": ({"lr": 0.5}, lambda p: torch.optim.SGD(p, lr=0.5)),
    "diloco": (
        {"optimizer": "sgd", "lr": 0.7, "momentum": 0.9, "nesterov": True},
        lambda p: torch.optim.SGD(p, lr=0.7, momentum=0.9, nesterov=True),
    ),
    "adam": ({"lr": 0.01}, lambda p: torch.optim.Adam(p, lr=0.01, betas=(0.9, 0.99), eps=1e-3)),
    "adamw": (
        {"lr": 0.01, "weight_decay": 0.1},
        lambda p: torch.optim.AdamW(p, lr=0.01, betas=(0.9, 0.99), eps=1e-3, weight_decay=0.1),
    ),
    "adamw without decay": (
        {"optimizer": "adamw"},
        lambda p: torch.optim.AdamW(p, lr=1.0, betas=(0.9, 0.99), eps=1e-3, weight_decay=0.0),
    ),
    "amsgrad": (
        {"optimizer": "adam", "amsgrad": True},
        lambda p: torch.optim.Adam(p, lr=1.0, betas=(0.9, 0.99), eps=1e-3, amsgrad=True),
    ),
    "adagrad": ({"lr": 0.01}, lambda p: torch.optim.Adagrad(p, lr=0.01, eps=1e-3)),
    "rmsprop": ({"lr": 0.01}, lambda p: torch.optim.RMSprop(p, lr=0.01, alpha=0.99, eps=1e-3)),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_equals_an_optimiser_that_never_stopped(name: str) -> None:
    given, make = OPTIMIZERS[name]
    settings = (lambda optimizer=name, **more: SERVER_OPTIMIZERS[optimizer](**more))(**given)
    draw = np.random.default_rng(0)
    shared = {
        "a/b.weight": draw.normal(size=(3, 2)).astype(np.float32),
        "c": draw.normal(size=4).astype(np.float32),
    }
    live = {key: torch.nn.Parameter(torch.from_numpy(value.copy())) for key, value in shared.items()}
    optimizer = make(list(live.values()))
    kept: dict[str, np.ndarray] = {}
    for _ in range(4):
        mean = {
            key: (value + draw.normal(size=value.shape)).astype(np.float32) for key, value in shared.items()
        }
        for key, value in live.items():
            value.grad = value.detach() - torch.from_numpy(mean[key])
        optimizer.step()
        before = digest(shared)
        result, kept = outer_step(shared, mean, kept, settings)
        assert digest(shared) == before  # inputs are not changed
        shared = result
        assert digest(shared) == digest({key: value.detach().numpy() for key, value in live.items()})


def test_diloco_numbers_by_hand() -> None:
    """lr 0.5, momentum 0.5, Nesterov; state 1, answers 0 then 0.25.

    Round 1: g = 1, m = 1, step 0.5 * (1 + 0.5 * 1) = 0.75 -> 0.25. Round 2: g = 0.25 - 0.25 = 0, m = 0.5,
    step 0.5 * (0 + 0.5 * 0.5) = 0.125 -> 0.125.
    """
    settings = SERVER_OPTIMIZERS["sgd"](lr=0.5, momentum=0.5, nesterov=True)
    one, kept = outer_step({"w": np.float32([1])}, {"w": np.float32([0])}, {}, settings)
    assert one["w"].tolist() == [0.25]
    assert {name: value.tolist() for name, value in kept.items()} == {"momentum_buffer/w": [1.0]}
    two, kept = outer_step(one, {"w": np.float32([0.25])}, kept, settings)
    assert two["w"].tolist() == [0.125]
    assert kept["momentum_buffer/w"].tolist() == [0.5]


def test_plain_sgd_with_rate_one_takes_the_mean() -> None:
    new, kept = outer_step(
        {"w": np.float32([3, 1])}, {"w": np.float32([2, 5])}, {}, SERVER_OPTIMIZERS["sgd"]()
    )
    assert new["w"].tolist() == [2, 5]
    assert kept == {}

"""The way down: whichever message a client gets, it holds the same bits as the server thinks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fedtune.errors import Refused
from fedtune.schema import Schema, digest
from fedtune.transforms.downlink import DOWNLINKS, DownlinkCode, HeldState, hold, holding
from fedtune.types import Tensors, Update
from fedtune.wire import EVERYONE, Expect, Header, decode, encode
from tests.tables import downlink_of


def state(round: int) -> dict[str, np.ndarray]:
    """A state that walks; one tensor without dimensions."""
    rng = np.random.default_rng(7)
    start = {"a": rng.normal(0, 1, (30, 8)), "b": rng.normal(0, 0.1, 100), "g": rng.normal(0, 1, ())}
    for _ in range(round):
        start = {name: value + rng.normal(0, 0.01, np.shape(value)) for name, value in start.items()}
    return {name: np.asarray(value, np.float32) for name, value in start.items()}


def wired(message: Update) -> Update:
    kinds = frozenset({"levels" if message.scales else "values"})
    data = encode(message, Header("run", 1, EVERYONE, "train"))
    return decode(data, Expect("run", 1, EVERYONE, "train", "", Schema.of(message.tensors), kinds))[1]


VARIANTS: list[dict[str, Any]] = [  # of DOWNLINKS, worth the same laws
    {"step": "delta", "start": "int8"},
    {"step": "delta", "keep": 0.05, "width": 2, "chunk": 64},
    {"step": "delta", "keep": 1.0},
    {"step": "delta", "keep": 1.0, "width": 2, "start": "int8"},
    {"step": "delta", "keep": 1.0, "width": 4, "start": "int8"},
    {"step": "delta", "keep": 1.0, "width": 8},
]
every = pytest.mark.parametrize(
    "settings",
    [downlink_of(**fields) for fields in [*({"step": name} for name in DOWNLINKS), *VARIANTS]],
    ids=repr,
)


@every
def test_both_sides_hold_the_same_bits(settings: DownlinkCode) -> None:
    server: HeldState | None = None
    client_state: dict[str, np.ndarray] = {}  # a client that is there in every round
    for round in range(1, 6):
        made = settings.pack(state(round), server, round)
        mine = holding(client_state)
        message = made.delta if made.delta and mine and mine.round == made.since else made.full
        tensors = settings.unpack(wired(message), mine.tensors if mine else None)
        newcomer = settings.unpack(wired(made.full), None)
        assert digest(tensors) == digest(newcomer) == digest(made.held.tensors)
        hold(client_state, HeldState(round, tensors))
        server = made.held
    assert (made.delta is not None) == settings.remembers


def test_the_first_delta_broadcast_is_the_state_itself() -> None:
    made = downlink_of(step="delta").pack(state(0), None, 1)
    assert made.delta is None and digest(made.held.tensors) == digest(state(0))


def test_int8_is_within_half_a_step() -> None:
    made = downlink_of(step="int8").pack(state(0), None, 1)
    for name, value in state(0).items():
        assert np.abs(made.held.tensors[name] - value).max() <= np.abs(value).max() / 254 * 1.01


@pytest.mark.parametrize(
    "options", [{}, *({k: v for k, v in fields.items() if k != "step"} for fields in VARIANTS)]
)
def test_what_a_delta_leaves_out_is_sent_later(options: dict[str, Any]) -> None:
    """A state that stands still is reached: the server's copy is its residual."""
    settings, goal = downlink_of("delta", **options), state(3)

    def away(held: HeldState) -> float:
        return float(np.sqrt(sum(np.sum((held.tensors[name] - value) ** 2) for name, value in goal.items())))

    held = settings.pack(state(0), None, 1).held
    first = away(held)
    for round in range(2, 150):
        held = settings.pack(goal, held, round).held
    assert away(held) < 0.02 * first


def test_more_than_two_bits_are_of_all_numbers() -> None:
    recipe = SimpleNamespace(chain=["a step"])
    assert [found for found, _, _ in downlink_of("delta", width=4).conflicts(recipe)] == [
        "downlink.width = 4 with downlink.keep = 0.2"
    ]
    assert not [
        *downlink_of("delta", width=4, keep=1.0).conflicts(recipe),
        *downlink_of("delta").conflicts(recipe),
    ]


def test_another_schema_makes_no_delta() -> None:
    settings = downlink_of(step="delta")
    held = settings.pack(state(0), None, 1).held
    assert settings.pack({"a": state(0)["a"]}, held, 2).delta is None


@pytest.mark.parametrize("before", [None, {"a": np.zeros(3, np.float32)}])
def test_a_delta_to_something_else_is_refused(before: Tensors | None) -> None:
    settings = downlink_of(step="delta")
    held = settings.pack(state(0), None, 1).held
    delta = settings.pack(state(1), held, 2).delta
    assert delta is not None
    with pytest.raises(Refused, match="W604"):
        settings.unpack(delta, before)


@every
def test_the_estimates_are_near_what_travels(settings: DownlinkCode) -> None:
    big = {"w": np.random.default_rng(0).uniform(-1, 1, (300, 300)).astype(np.float32)}
    first = settings.pack(big, None, 1)
    second = settings.pack({"w": big["w"] * np.float32(1.1)}, first.held, 2)
    for told, message in zip(
        settings.bits(Schema.of(big)), (first.full, second.delta or second.full), strict=True
    ):
        sent = 8 * len(encode(message, Header("run", 2, EVERYONE, "train"))) / big["w"].size
        assert sent == pytest.approx(told, rel=0.06)

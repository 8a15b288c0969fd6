"""The way down: whichever message a client gets, it holds the same bits as the server thinks."""

from __future__ import annotations

import numpy as np
import pytest

from fedtune.errors import Refused
from fedtune.schema import Schema, digest
from fedtune.transforms.broadcast import DownlinkSettings, Held, down_bits, hold, holding, pack, unpack
from fedtune.types import Tensors, Update
from fedtune.wire import EVERYONE, Expect, Header, decode, encode


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


@pytest.mark.parametrize("step", ["none", "int8", "delta"])
def test_both_sides_hold_the_same_bits(step: str) -> None:
    settings = DownlinkSettings(step=step)  # type: ignore[arg-type]
    server: Held | None = None
    memory: dict[str, np.ndarray] = {}  # a client that is there in every round
    for round in range(1, 6):
        made = pack(settings, state(round), server, round)
        mine = holding(memory)
        message = made.delta if made.delta and mine and mine.round == made.since else made.full
        tensors = unpack(settings, wired(message), mine.tensors if mine else None)
        newcomer = unpack(settings, wired(made.full), None)
        assert digest(tensors) == digest(newcomer) == digest(made.held.tensors)
        hold(memory, Held(round, tensors))
        server = made.held
    assert (made.delta is not None) == (step == "delta")


def test_the_first_delta_broadcast_is_the_state_itself() -> None:
    made = pack(DownlinkSettings(step="delta"), state(0), None, 1)
    assert made.delta is None and digest(made.held.tensors) == digest(state(0))


def test_int8_is_within_half_a_step() -> None:
    made = pack(DownlinkSettings(step="int8"), state(0), None, 1)
    for name, value in state(0).items():
        assert np.abs(made.held.tensors[name] - value).max() <= np.abs(value).max() / 254 * 1.01


def test_what_a_delta_leaves_out_is_sent_later() -> None:
    """A state that stands still is reached: the server's copy is its residual."""
    settings, goal = DownlinkSettings(step="delta", keep=0.2), state(3)

    def away(held: Held) -> float:
        return float(np.sqrt(sum(np.sum((held.tensors[name] - value) ** 2) for name, value in goal.items())))

    held = pack(settings, state(0), None, 1).held
    first = away(held)
    for round in range(2, 40):
        held = pack(settings, goal, held, round).held
    assert away(held) < 0.02 * first


def test_another_schema_makes_no_delta() -> None:
    settings = DownlinkSettings(step="delta")
    held = pack(settings, state(0), None, 1).held
    assert pack(settings, {"a": state(0)["a"]}, held, 2).delta is None


@pytest.mark.parametrize("before", [None, {"a": np.zeros(3, np.float32)}])
def test_a_delta_to_something_else_is_refused(before: Tensors | None) -> None:
    settings = DownlinkSettings(step="delta")
    held = pack(settings, state(0), None, 1).held
    delta = pack(settings, state(1), held, 2).delta
    assert delta is not None
    with pytest.raises(Refused, match="W604"):
        unpack(settings, delta, before)


def test_the_estimates_are_near_what_travels() -> None:
    big = {"w": np.random.default_rng(0).uniform(-1, 1, (300, 300)).astype(np.float32)}
    for step in ("none", "int8", "delta"):
        settings = DownlinkSettings(step=step)  # type: ignore[arg-type]
        first = pack(settings, big, None, 1)
        second = pack(settings, {"w": big["w"] * np.float32(1.01)}, first.held, 2)
        for told, message in zip(down_bits(settings, Schema.of(big)), (second.full, second.delta or second.full), strict=True):
            sent = 8 * len(encode(message, Header("run", 2, EVERYONE, "train"))) / big["w"].size
            assert sent == pytest.approx(told, rel=0.05)

"""Which chains are legal, and that a wrong one says why before anything runs."""

from __future__ import annotations

import numpy as np
import pytest

from fedtune.errors import FedtuneError
from fedtune.transforms import Chain, Transform, build
from fedtune.transforms.quantize import SignSettings
from fedtune.types import Client, Round, Update

NOW = Round(1, 0, (0, 1))
SITE = Client(0, "site", None, None)


def kind(name: str, undone: str = "sum", takes: str = "real", gives: str = "real") -> Transform:
    """A step with nothing but its declarations."""
    return type(name, (Transform,), {"name": name, "undone": undone, "takes": takes, "gives": gives})()


def private() -> Transform:
    return kind("private")


def ring() -> Transform:
    return kind("ring", gives="ring")


def mask() -> Transform:
    return kind("mask", takes="ring", gives="ring")


def seal() -> Transform:
    return kind("seal", undone="reply", takes="any", gives="same")


def packed() -> Transform:
    return build([SignSettings(step="sign")]).steps[0]


@pytest.mark.parametrize(
    ("steps", "kinds"),
    [
        ([], "values"),
        ([private()], "values"),
        ([private(), ring(), mask(), seal()], "ring"),
        ([private(), packed(), seal()], "levels"),
        ([private(), seal()], "values"),
    ],
)
def test_legal_chains_say_what_travels(steps: list[Transform], kinds: str) -> None:
    assert Chain(steps).kinds == {kinds}


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        ([mask()], "'mask' after a step that gives real numbers, expected ring numbers before 'mask'"),
        ([packed(), mask()], "'mask' after a step that gives packed numbers"),
        (
            [seal(), private()],
            "'private', which is undone on the sum, after 'seal', which is undone on each reply",
        ),
        ([ring(), packed()], "'sign' after a step that gives ring numbers, expected real numbers"),
        ([packed(), private()], "'private' after a step that gives packed numbers"),
        ([packed(), packed()], "'sign' after a step that gives packed numbers"),
    ],
)
def test_wrong_chains_say_why(steps: list[Transform], words: str) -> None:
    with pytest.raises(FedtuneError, match=words) as caught:
        Chain(steps)
    assert caught.value.code == "C104"


def test_client_halves_run_in_order_and_server_halves_in_reverse() -> None:
    class Note(Transform):
        def __init__(self, name: str, undone: str) -> None:
            self.name, self.undone = name, undone  # type: ignore[misc]

        def on_client(self, update: Update, client: Client, now: Round) -> Update:
            said.append(f"client {self.name}")
            return update

        def on_reply(self, update: Update, client: int, now: Round) -> Update:
            if self.undone == "reply":
                said.append(f"reply {self.name}")
            return update

        def on_sum(self, total: Update, now: Round) -> Update:
            if self.undone == "sum":
                said.append(f"sum {self.name}")
            return total

    said: list[str] = []
    chain = Chain([Note("a", "sum"), Note("b", "sum"), Note("c", "reply"), Note("d", "reply")])
    chain.settle(chain.receive(chain.send(Update.of({"w": np.ones(1)}), SITE, NOW), 0, NOW), NOW)
    assert said == ["client a", "client b", "client c", "client d", "reply d", "reply c", "sum b", "sum a"]


def test_with_steps_the_difference_travels_and_without_the_value() -> None:
    near = {"w": np.float32([10.0, 20.0])}
    state = Update.of({"w": np.float32([11.0, 18.0])}, 3.0)
    assert Chain().send(state, SITE, NOW, near) is state
    chain = Chain([packed()])
    sent = chain.send(state, Client(0, "site", None, None), NOW, near)
    assert sent.tensors["w"].tolist() == [1, -1] and sent.scales["w"] == 1.5
    back = chain.settle(chain.receive(sent, 0, NOW), NOW, near)
    assert back.values()["w"].tolist() == [11.5, 18.5]

"""The running sum of a round: its order, and what never gets into it. Answers are made here, so that no model
is needed."""

from __future__ import annotations

import hashlib
import itertools
import math
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest

from fedtune.events import ClientLeftOut, Event
from fedtune.methods.fedpeft import FedPEFT, FedPEFTSettings
from fedtune.runtime.cohort import RoundCohort
from fedtune.runtime.protocol import Ask, Link, Reply
from fedtune.runtime.replies import ascending
from fedtune.schema import Schema
from fedtune.transforms import build
from fedtune.transforms.base import Chain
from fedtune.transforms.quantize import QuantizeSettings
from fedtune.types import Client, Round, Update
from fedtune.wire import encode
from fedtune.wire.settings import LimitSettings

LINK = Link("0" * 16, "0" * 64, FedPEFT(FedPEFTSettings(), 1), Chain([]))
GIVEN = {"w": np.zeros(2, np.float32)}
ROAD = [
    (2.0**36, 3.0),
    (2.0**-24, 2.0**-30),
    (-(2.0**36), -3.0),
    (1e-16, 5.0),
]  # in float64 too, what is added first decides what is left


def payload_of(update: Update, client: int, link: Link = LINK) -> bytes:
    return encode(update, link.header("train", client, Round(1, 0, ()), Schema.of(GIVEN)))


def altered(message: bytes, form: str, old: float, new: float) -> bytes:
    """A message in which a sender that checks nothing wrote another number; its seal fits (a SHA-256, behind
    a tag of two bytes)."""
    assert message.count(struct.pack(form, old)) == 1
    body = message.replace(struct.pack(form, old), struct.pack(form, new))[:-34]
    return body + message[-34:-32] + hashlib.sha256(body).digest()


def cohort_of(
    payloads: Sequence[bytes],
    arrival: Sequence[int],
    tell: Callable[[Event], None] = lambda event: None,
    link: Link = LINK,
) -> RoundCohort:
    """A round whose members' answers are these."""
    now = Round(1, 0, tuple(range(len(payloads))))

    def transport(asks: Sequence[Ask]) -> list[Reply]:
        assert [ask.client for ask in asks] == list(now.members)
        return [Reply(client, payloads[client]) for client in arrival]

    return RoundCohort(link, now, transport, tell, {client: f"client {client}" for client in now.members})


def test_answers_are_added_in_ascending_id_whatever_order_they_come_in() -> None:
    updates = [
        Update.of({"w": np.float32(pair)}, 1.0 + 2.0**-50 * number, {"loss": 10.0**-number})
        for number, pair in enumerate(ROAD)
    ]
    payloads = [payload_of(update, client) for client, update in enumerate(updates)]
    want = updates[0] + updates[1] + updates[2] + updates[3]
    backwards = updates[3] + updates[2] + updates[1] + updates[0]
    assert want.tensors["w"].tobytes() != backwards.tensors["w"].tobytes()  # the order shows
    for arrival in itertools.permutations(range(4)):
        got = cohort_of(payloads, arrival, link=replace(LINK, limits=LimitSettings(spread=0))).sum(
            "train", GIVEN
        )
        assert got.tensors["w"].tobytes() == want.tensors["w"].tobytes() and (got.weight, got.metrics) == (
            want.weight,
            want.metrics,
        )


def test_single_answers_come_in_ascending_id_and_as_soon_as_they_can() -> None:
    seen: list[str] = []

    def arriving() -> Iterator[Reply]:
        for client in (2, 1, 4, 3):
            seen.append(f"{client} came")
            yield Reply(client)

    for reply in ascending(arriving(), (1, 2, 3, 4)):
        seen.append(f"{reply.client} given on")
    assert seen == [
        "2 came",
        "1 came",
        "1 given on",
        "2 given on",
        "4 came",
        "3 came",
        "3 given on",
        "4 given on",
    ]


HONEST = (
    Update.of({"w": np.float32([1, 2])}, 2.0, {"loss": 1.0}),
    Update.of({"w": np.float32([3, 4])}, 2.0, {"loss": 2.0}),
)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", ["tensor", "figure", "weight"])
def test_numbers_that_are_not_finite_never_get_into_a_sum(place: str, bad: float) -> None:
    marks = {"tensor": ("<f", 5.25), "figure": ("<d", 6.5), "weight": ("<d", 1.625)}
    form, mark = marks[place]
    honest = payload_of(Update.of({"w": np.float32([5.25, 2])}, 1.625, {"loss": 6.5 / 1.625}), 1)
    spoilt, told = altered(honest, form, mark, bad), list[Event]()
    cohort = cohort_of([payload_of(HONEST[0], 0), spoilt, payload_of(HONEST[1], 2)], (1, 0, 2), told.append)
    got = cohort.sum("train", GIVEN)
    assert (
        got.values()["w"].tolist() == [2.0, 3.0]
        and got.metrics == cohort.metrics == {"loss": 6.0}
        and got.weight == 4.0
    )
    assert [(event.client, event.code) for event in told if isinstance(event, ClientLeftOut)] == [(1, "W607")]
    assert cohort.answers[1].outcome == "W607" and cohort.answers[1].weight == 0


@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.parametrize(
    "chain", [Chain([]), build([QuantizeSettings(step="quantize", bits=8)])], ids=["plain", "coded"]
)
def test_what_overflows_once_it_is_weighed_never_gets_into_a_sum(chain: Chain) -> None:
    """Every number of the message is finite; the largest float32 times the weight is not."""
    link = replace(LINK, chain=chain, limits=LimitSettings(weight=1e300, spread=0))
    most = Update({"w": np.array([1e308, 1.0])}, 1e270, {"loss": 1.0})

    def sent(update: Update, client: int) -> bytes:
        return payload_of(
            chain.send(update, Client(client, "", None, None), Round(1, 0, ()), GIVEN), client, link
        )

    large = altered(sent(most, 1), "<d", 1e270, 1e299)
    cohort = cohort_of([sent(HONEST[0], 0), large], (1, 0), link=link)
    got = cohort.sum("train", GIVEN)
    assert cohort.answers[1].outcome == "W607" and np.isfinite(got.tensors["w"]).all() and got.weight == 2.0

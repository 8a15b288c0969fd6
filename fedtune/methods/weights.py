"""`method.weight`: what a client's answer counts for in the mean. One choice for every method, under every
rule that takes weights; the client says it with its answer."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BeforeValidator

from fedtune.types import Client

LOSS = "weight/loss/"  # in a client's state: the loss of its answer before, by question
SLOWEST = 2.0  # largest ratio of two losses that counts: one client's is at most e times another's
UNIT = 1000  # weights by speed are whole numbers, which methods of whole numbers can add, too


def renamed(value: Any) -> Any:
    """Earlier versions wrote rows as examples."""
    return "rows" if value == "examples" else value


Weight = Annotated[Literal["rows", "tokens", "equal", "loss-speed"], BeforeValidator(renamed)]
TELLS: dict[str, str] = {
    "rows": "the number of its rows",
    "tokens": "the number of its tokens",
    "equal": "the same from everybody",
    "loss-speed": "how its loss compares with that of its answer before",
}


def weight_of(kind: str, client: Client, loss: float, verb: str = "train") -> float:
    """What this answer counts for. rows: examples that the client trains on (blocks of text, for causal-lm);
    tokens: those that carry loss; equal: 1; loss-speed: `by_speed`, from a loss that the client remembers."""
    if kind == "loss-speed":
        before = client.state.get(LOSS + verb)
        client.state[LOSS + verb] = np.asarray([loss], np.float64)
        return by_speed(loss, None if before is None else float(before[0]))
    return {"rows": float(len(client.data)), "tokens": float(client.data.tokens), "equal": 1.0}[kind]


def by_speed(loss: float, before: float | None) -> float:
    """1000 exp(r / 2), rounded, where r is this answer's mean training loss over that of the client's answer
    before, from 0 to 2; 1 where there is none. A client whose loss falls slowly counts more: dynamic weight
    average (Liu, Johns and Davison 2019, arXiv:1803.10704, eq. 7, T = 2), whose softmax is the mean's
    division by the sum of weights."""
    ratio = loss / before if before else 1.0
    return float(round(UNIT * math.exp(min(max(ratio, 0.0), SLOWEST) / 2)))


def heaviest(kind: str, rows: float, tokens: float) -> float:
    """The most that `weight_of` says for a client of at most so many rows and tokens."""
    return {
        "rows": rows,
        "tokens": tokens,
        "equal": 1.0,
        "loss-speed": by_speed(SLOWEST, 1.0),
    }[kind]

"""A task head that starts from the data: one question before the first round, whose answers are sums, and a
head made of them.

Class means: the row of a class is the unit mean of its rows' unit features, times a temperature over a
feature's mean length (FedNCM,
Legate et al. 2023, arXiv:2306.03937). Ridge: the least-squares map from unit features to classes, from second
moments that are summed too
(as Fed3R, Fani et al. 2024, arXiv:2405.14445). Both are linear in the rows: the sum over clients is that of
one client with all rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from fedtune.errors import FedtuneError
from fedtune.methods.interface import Verb, Work
from fedtune.schema import Schema
from fedtune.types import Client, Cohort, Round, State, Tensors, Update

if TYPE_CHECKING:
    from fedtune.model.tunable import TunableModel

HeadStart = Literal["auto", "random", "means", "ridge"]
FEATURES = "features"  # the verb
TEMPERATURE = 16.0  # of the logits; found on CLINC150, where 8 loses half a point and 32 wins nothing
RIDGE = 1e-2  # the penalty, in units of a mean squared feature
MARK = "head/"  # in what the server keeps: the matrix that has yet to start, under its name


def starts(kind: HeadStart, head: str) -> bool:
    """Whether a head of that name starts from the data: `auto` where there is one."""
    return kind != "random" and bool(head)


def kept_until_started(kind: HeadStart, tunable: TunableModel) -> dict[str, np.ndarray]:
    """What a method's `start` adds to the state's kept tensors. Raises M306 for a start without such a
    head."""
    if kind in ("means", "ridge") and not tunable.head:
        found, expected = (
            f"method.head_start = '{kind}' where no fresh head of classes is trained",
            "a classifier whose file has no trained head",
        )
        raise FedtuneError("M306", found, expected, "leave method.head_start out")
    return {MARK + tunable.head: tunable.read_one(tunable.head)} if starts(kind, tunable.head) else {}


def features_verb(kind: HeadStart, work: Work) -> Verb:
    """The question, asked once. Clients are given the head as it is, which says its name and shape."""

    def given(tunable: Any, client: int, now: Round) -> Schema:
        return Schema(((tunable.head, tuple(tunable.named[tunable.head].shape)),))

    def answer(given: Schema, now: Round) -> Schema:
        ((_, (classes, width)),) = given.entries
        moments = (("moments", (width, width)),) if kind == "ridge" else ()
        return Schema((*moments, ("norm", (1,)), ("shares", (classes,)), ("sums", (classes, width))))

    shows = (
        "the share of each class and the sum of its rows' unit features: of a class with one row, that row's "
        "feature"
    )
    return Verb(work, given, answer, shows=shows, once=True, applies=lambda tunable: bool(tunable.head))


def tell_features(kind: HeadStart) -> Work:
    """A client's half, where the network is in one piece."""

    def work(client: Client, given: Tensors, now: Round) -> Update:
        from fedtune.model.features import class_sums

        return Update.of(class_sums(client.model, client.data, kind == "ridge"), float(len(client.data)))

    return work


def features_verbs(kind: HeadStart, work: Work | None = None) -> dict[str, Verb]:
    """The question among a method's verbs, where it may be asked; `work` where the network is not in one
    piece."""
    return {} if kind == "random" else {FEATURES: features_verb(kind, work or tell_features(kind))}


def start_conflicts(kind: HeadStart, recipe: Any) -> Iterator[tuple[str, str, str]]:
    """For a table's `conflicts`."""
    if kind in ("means", "ridge") and recipe.data.task in ("causal-lm", "instruct"):
        yield (
            f"method.head_start = '{kind}' with data.task = '{recipe.data.task}'",
            "a task with classes",
            "remove it",
        )


def started(kind: HeadStart, state: State, cohort: Cohort) -> State:
    """The state with its head started, where it has yet to be: the server's half, before the first round's
    own question."""
    made = head_of(kind, state.kept, cohort)
    return State(
        {**state.shared, **made},
        {key: value for key, value in state.kept.items() if not key.startswith(MARK)},
    )


def head_of(kind: HeadStart, kept: Tensors, cohort: Cohort) -> dict[str, np.ndarray]:
    """The started head by its name, float32, where it has yet to start; nothing otherwise."""
    name = next((key for key in kept if key.startswith(MARK)), "")
    if not name:
        return {}
    said = cohort.sum(FEATURES, {name.removeprefix(MARK): kept[name]}).values()
    head = ridge_head(said) if kind == "ridge" else means_head(said)
    return {name.removeprefix(MARK): np.ascontiguousarray(head, np.float32)}


def means_head(said: Tensors) -> np.ndarray:
    """(C, d) from the means of all rows; a class that nobody has starts as the mean of the others."""
    sums, shares = said["sums"].astype(np.float64), said["shares"]
    rows: np.ndarray = sums / np.maximum(np.linalg.norm(sums, axis=1, keepdims=True), 1e-12)
    there = shares > 0
    if there.any():
        rows[~there] = rows[there].mean(axis=0)
    return np.asarray(rows * (TEMPERATURE / max(float(said["norm"][0]), 1e-12)))


def ridge_head(said: Tensors) -> np.ndarray:
    """(C, d): the least-squares map to the classes, at the means head's scale."""
    sums, second = said["sums"].astype(np.float64), said["moments"].astype(np.float64)
    second = (second + second.T) / 2 + RIDGE * np.trace(second) * np.eye(len(second)) / len(second)
    rows: np.ndarray = np.linalg.solve(second, sums.T).T
    return np.asarray(rows * (TEMPERATURE / max(float(said["norm"][0]), 1e-12)))

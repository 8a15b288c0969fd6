"""A task head that starts from the data: one question before the first round, whose answers are sums, and a
head made of them.

Class means: the row of a class is the unit mean of its rows' unit features, times a temperature over a
feature's mean length (FedNCM, Legate et al. 2023, arXiv:2306.03937). Ridge: the least-squares map from unit
features to classes, from second moments that are summed too (as Fed3R, Fani et al. 2024, arXiv:2405.14445).
LDA: linear discriminants, class means seen through the covariance that all classes share, from the same
sums; it needs the head's bias. All are linear in the rows: the sum over clients is that of one client with
all rows.

Private class means (`head_noise`): clients tell the sums of unit features and nothing else, to which a row
adds one of length 1, so that Gaussian noise can cover it. A class that nobody has starts as noise, and the
length of a feature is that of a text that everybody knows. Second moments, for ridge and LDA, are bounded as
well, but their noise is one in (width x width) numbers, and takes an inverse.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import Field

from fedtune.errors import FedtuneError
from fedtune.methods.interface import Verb, Work
from fedtune.privacy.noise import noisy
from fedtune.privacy.releases import Release
from fedtune.schema import Schema
from fedtune.types import LM_TASKS, Client, Round, State, Sums, Tensors, Update

if TYPE_CHECKING:
    from fedtune.model.tunable import TunableModel

HeadStart = Literal["auto", "random", "means", "ridge", "lda"]
HeadNoise = Literal["off"] | Annotated[float, Field(ge=0, le=1e6)]
FROM_DATA = ("means", "ridge", "lda")
FEATURES = "features"  # the verb
TEMPERATURE = 16.0  # of the logits; found on CLINC150, where 8 loses half a point and 32 wins nothing
RIDGE = 1e-2  # the penalty, in units of a mean squared feature; of LDA, of a mean variance within classes
STEEPNESS = (
    50.0  # mean length of LDA's rows: as steep as fits the probabilities on CLINC150 and on docstrings
)
WIDEST = 1024  # of features whose second moments `auto` asks for: four megabytes
MARK = "head/"  # in what the server keeps: the matrix that has yet to start, under its name
LENGTH = "length/head"  # and beside it, for private class means, how long a feature is


def starts(kind: HeadStart, head: str) -> bool:
    """Whether a head of that name starts from the data: `auto` where there is one."""
    return kind != "random" and bool(head)


def bias_of(tunable: TunableModel) -> str:
    """Name of the head's bias among the trained tensors; "" where it has none."""
    name = tunable.head.removesuffix("weight") + "bias"
    return name if tunable.head and name in tunable.named else ""


def private(kind: HeadStart, noise: HeadNoise) -> bool:
    """Whether the head starts from private class means."""
    return noise != "off" and kind in ("auto", "means")


def takes_bias(kind: HeadStart, tunable: TunableModel, noise: HeadNoise = "off") -> bool:
    """Whether the head starts by LDA: `auto` where it has a bias and is not too wide."""
    if kind not in ("auto", "lda") or private(kind, noise) or not bias_of(tunable):
        return False
    return kind == "lda" or tunable.named[tunable.head].shape[1] <= WIDEST


def starting(kind: HeadStart, tunable: TunableModel, noise: HeadNoise = "off") -> tuple[str, ...]:
    """Names of the tensors that start from the data: the head's matrix, and its bias for LDA."""
    if not starts(kind, tunable.head):
        return ()
    return (tunable.head, bias_of(tunable)) if takes_bias(kind, tunable, noise) else (tunable.head,)


def kept_until_started(
    kind: HeadStart, tunable: TunableModel, noise: HeadNoise = "off"
) -> dict[str, np.ndarray]:
    """What a method's `start` adds to the state's kept tensors. Raises M306 for a start without such a
    head."""
    if kind == "lda" and tunable.head and not bias_of(tunable):
        found = "method.head_start = 'lda' with a task head that has no bias"
        raise FedtuneError("M306", found, "a bias", "set method.head_start = 'ridge', or leave it out")
    if kind in FROM_DATA and not tunable.head:
        found, expected = (
            f"method.head_start = '{kind}' where no fresh head of classes is trained",
            "a classifier whose file has no trained head",
        )
        raise FedtuneError("M306", found, expected, "leave method.head_start out")
    waiting = {MARK + name: tunable.read_one(name) for name in starting(kind, tunable, noise)}
    if waiting and private(kind, noise):
        from fedtune.model.features import public_length

        waiting[LENGTH] = np.array([public_length(tunable)], np.float32)
    return waiting


def features_verb(kind: HeadStart, work: Work, noise: HeadNoise = "off") -> Verb:
    """The question, asked once. Clients are given the head as it is, which says its name and shape."""
    alone = private(kind, noise)

    def given(tunable: Any, client: int, now: Round) -> Schema:
        names = starting(kind, tunable, noise)
        return Schema(tuple(sorted((name, tuple(tunable.named[name].shape)) for name in names)))

    def answer(given: Schema, now: Round) -> Schema:
        ((classes, width),) = (shape for _, shape in given.entries if len(shape) == 2)
        if alone:
            return Schema((("sums", (classes, width)),))
        moments = (("moments", (width, width)),) if needs_moments(kind, len(given.entries)) else ()
        return Schema((*moments, ("norm", (1,)), ("shares", (classes,)), ("sums", (classes, width))))

    shows = (
        "the share of each class and the sum of its rows' unit features: of a class with one row, that row's "
        "feature"
    ) + ("" if kind == "means" else "; for ridge and LDA the mean product of every two numbers of a feature")
    if alone:
        shows = "the sum of its rows' unit features by class" + (
            f", of which a row changes no more than 1, under noise of {noise:g} on every number"
            if noise
            else ""
        )
    return Verb(
        work,
        given,
        answer,
        directed=alone,
        spends=Release("gaussian", "example", float(noise)) if alone else None,
        shows=shows,
        once=True,
        applies=lambda tunable: bool(tunable.head),
    )


def tell_features(kind: HeadStart) -> Work:
    """A client's half, where the network is in one piece."""

    def work(client: Client, given: Tensors, now: Round) -> Update:
        from fedtune.model.features import class_sums

        moments = needs_moments(kind, len(given))
        return Update.of(class_sums(client.model, client.data, moments), float(len(client.data)))

    return work


def tell_sums(noise: float) -> Work:
    """A client's half of private class means: their sums, under noise of its own, and how many rows it has,
    which is taken to be known."""

    def work(client: Client, given: Tensors, now: Round) -> Update:
        from fedtune.model.features import class_sums

        means = {"sums": class_sums(client.model, client.data)["sums"]}
        return noisy(Update.of(means, float(len(client.data))), noise)

    return work


def needs_moments(kind: HeadStart, given: int) -> bool:
    """Whether second moments are asked for, by the number of tensors that are given: a bias comes along for
    LDA alone."""
    return kind == "ridge" or given == 2


def features_verbs(kind: HeadStart, work: Work | None = None, noise: HeadNoise = "off") -> dict[str, Verb]:
    """The question among a method's verbs, where it may be asked; `work` where the network is not in one
    piece."""
    if kind == "random":
        return {}
    work = work or (tell_sums(float(noise)) if private(kind, noise) else tell_features(kind))
    return {FEATURES: features_verb(kind, work, noise)}


def start_conflicts(kind: HeadStart, recipe: Any) -> Iterator[tuple[str, str, str]]:
    """For a table's `conflicts`."""
    if kind in FROM_DATA and recipe.data.task in LM_TASKS:
        yield (
            f"method.head_start = '{kind}' with data.task = '{recipe.data.task}'",
            "a task with classes",
            "remove it",
        )


def noise_conflicts(kind: HeadStart, noise: HeadNoise, recipe: Any) -> Iterator[tuple[str, str, str]]:
    """The same of method.head_noise."""
    if noise == "off":
        return
    here = f"method.head_noise = {noise:g}"
    if kind in ("ridge", "lda"):
        yield (
            f"method.head_start = '{kind}' with {here}",
            "means: the second moments of a feature would take so much noise that no inverse survives it",
            "set method.head_start = 'means'",
        )
    if kind == "random" or recipe.data.task in LM_TASKS:
        found = f"{here} with " + (
            "method.head_start = 'random'" if kind == "random" else f"data.task = '{recipe.data.task}'"
        )
        yield found, "a task head that starts from class sums", "remove method.head_noise"
    if noise and not recipe.method.spends:
        yield (
            f"{here} with training that tells of rows without noise",
            "method.train.private beside it; or 0 under step 'private' or a site's own noise",
            "set method.train.private.max_grad_norm, or method.head_noise = 0",
        )


def waits(state: State) -> bool:
    """Whether the head has yet to start from the data."""
    return any(key.startswith(MARK) for key in state.kept)


def started(kind: HeadStart, state: State, cohort: Sums) -> State:
    """The state with its head started, where it has yet to be: the server's half, before the first round's
    own question."""
    made = head_of(kind, state.kept, cohort)
    return State(
        {**state.shared, **made},
        {key: value for key, value in state.kept.items() if not key.startswith(MARK) and key != LENGTH},
    )


def head_of(kind: HeadStart, kept: Tensors, cohort: Sums) -> dict[str, np.ndarray]:
    """The started head's matrix, and its bias for LDA, by their names, float32, where it has yet to start;
    nothing otherwise."""
    waiting = {key.removeprefix(MARK): value for key, value in kept.items() if key.startswith(MARK)}
    if not waiting:
        return {}
    said = cohort.sum(FEATURES, waiting).values()
    if LENGTH in kept:
        there = np.linalg.norm(said["sums"], axis=1)  # nothing alone is nobody's; noise is not nothing
        said = {**said, "shares": there, "norm": kept[LENGTH]}
    if len(waiting) == 2:
        matrix, bias = lda_head(said)
        made = {name: matrix if value.ndim == 2 else bias for name, value in waiting.items()}
    else:
        made = {next(iter(waiting)): ridge_head(said) if kind == "ridge" else means_head(said)}
    return {name: np.ascontiguousarray(value, np.float32) for name, value in made.items()}


def lda_head(said: Tensors) -> tuple[np.ndarray, np.ndarray]:
    """(C, d) and (C,): linear discriminants of unit features, all classes as likely as one another; a class
    that nobody has starts as the mean of the others."""
    sums, shares = said["sums"].astype(np.float64), said["shares"].astype(np.float64)
    there = shares > 0
    means = sums[there] / shares[there, None]
    within = said["moments"].astype(np.float64) - (means * shares[there, None]).T @ means
    spread = max(float(np.trace(within)) / len(within), 1e-9)
    within = (within + within.T) / 2 + RIDGE * spread * np.eye(len(within))
    rows: np.ndarray = np.linalg.solve(within, means.T).T
    bias = -0.5 * (rows * means).sum(axis=1)
    rows, bias = rows - rows.mean(axis=0), bias - bias.mean()  # which changes no probability
    scale = STEEPNESS / max(float(np.linalg.norm(rows, axis=1).mean()), 1e-12)
    matrix, offsets = np.zeros_like(sums), np.zeros(len(sums))
    matrix[there], offsets[there] = scale / max(float(said["norm"][0]), 1e-12) * rows, scale * bias
    return matrix, offsets


def joined(head: Tensors) -> np.ndarray:
    """A head's matrix, with its bias as a last column where that starts too."""
    matrix = next(value for value in head.values() if value.ndim == 2)
    return np.column_stack([matrix, *(value for value in head.values() if value.ndim == 1)])


def set_first_head(tunable: TunableModel, given: np.ndarray) -> None:
    """What `joined` made, float32 in the bits of whole numbers, as the first values of the model's head."""
    from fedtune.model.initial_values import set_first

    values = np.ascontiguousarray(given).view(np.float32)
    width = tunable.named[tunable.head].shape[1]
    set_first(tunable, tunable.head, values[:, :width])
    if values.shape[1] > width:
        set_first(tunable, bias_of(tunable), values[:, width])


def joined_shape(kind: HeadStart, tunable: TunableModel) -> tuple[int, int]:
    """Of what `joined` makes."""
    classes, width = tunable.named[tunable.head].shape
    return classes, width + takes_bias(kind, tunable)


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

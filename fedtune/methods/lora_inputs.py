"""Starts that look at what layers are given. EVA: A begins as the directions in which a layer's inputs vary
most (Paischer et al. 2024, arXiv:2410.07170, without their redistribution of ranks); CorDA: both factors as
the directions of the weight that those inputs use most (lora_start.py).

One question before the first round: means and second moments of each adapted layer's inputs, which are sums
over rows, so that clients' add up to what one client with all rows would find. The coordinator decomposes
them, once, and every client trains from that. The first model is the base: EVA's B begins at zero, CorDA's
pair has a residual.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from fedtune.errors import FedtuneError
from fedtune.methods.interface import Verb
from fedtune.methods.lora_start import A_END, B_END, LoraStart, begun_pairs, check_weights
from fedtune.schema import Schema
from fedtune.types import Client, Round, State, Sums, Tensors, Update

if TYPE_CHECKING:
    from fedtune.model.tunable import TunableModel

MOMENTS = "moments"  # the verb
MARK = "lora_start"  # in what the server keeps, until A has been started
OF_INPUTS = ("eva", "corda")
WIDEST = 2048  # of inputs: sixteen megabytes a layer


def kept_until_begun(kind: LoraStart, tunable: TunableModel, rank: int) -> dict[str, np.ndarray]:
    """What a method's `start` adds to the state's kept tensors. Raises M306 for layers too wide, or that
    cannot be decomposed."""
    if kind not in OF_INPUTS:
        return {}
    wide = [name for name, value in tunable.named.items() if name.endswith(A_END) and value.shape[1] > WIDEST]
    if wide:
        raise FedtuneError(
            "M306",
            f"method.lora_start = '{kind}' with {tunable.named[wide[0]].shape[1]:,} inputs of '{wide[0]}'",
            f"at most {WIDEST:,}, of which every client sends the second moments",
            "choose other method.adapter.targets or method.lora_start = 'pissa'",
        )
    if kind == "corda":
        check_weights(tunable, rank)
    return {MARK: np.zeros(1, np.float32)}


def moments_verbs(kind: LoraStart, rank: int) -> dict[str, Verb]:
    """The question among a method's verbs. Clients are given A as it is, which names layers and widths; the
    tunable model's may stand behind a residual."""

    def given(tunable: Any, client: int, now: Round) -> Schema:
        each = [(name, value) for name, value in tunable.named.items() if name.endswith(A_END)]
        return Schema(tuple((name, (rank, value.shape[1])) for name, value in each))

    def answer(given: Schema, now: Round) -> Schema:
        layers = [(name.removesuffix(A_END), shape[1]) for name, shape in given.entries]
        each = [((f"{name}.mean", (k,)), (f"{name}.second", (k, k))) for name, k in layers]
        return Schema(tuple(sorted(entry for pair in each for entry in pair)))

    shows = (
        "means and mean products of every two numbers of what each adapted layer is given, over its tokens"
    )
    return {MOMENTS: Verb(tell_moments, given, answer, shows=shows, once=True)} if kind in OF_INPUTS else {}


def tell_moments(client: Client, given: Tensors, now: Round) -> Update:
    """A client's half. With B at zero, and a residual's with it, the base is asked."""
    from fedtune.model.input_moments import input_moments

    values = client.model.read()
    client.model.write({name: value * (not name.endswith(B_END)) for name, value in values.items()})
    return Update.of(input_moments(client.model, client.data), float(len(client.data)))


def begun(
    state: State, cohort: Sums, kind: LoraStart, tunable: TunableModel | None, seat: tuple[int, float]
) -> State:
    """The state with its factors started, where they have yet to be: the server's half. `tunable` has the
    weights, `seat` are rank and scale."""
    if MARK not in state.kept:
        return state
    given = {name: value for name, value in state.shared.items() if name.endswith(A_END)}
    said = cohort.sum(MOMENTS, given).values()
    if kind == "corda":
        if tunable is None:
            raise RuntimeError("a state begins after `start`, which keeps the model whose weights it takes")
        made = begun_pairs(tunable, said, *seat)
    else:
        made = {name: directions(said, name.removesuffix(A_END), value) for name, value in given.items()}
    kept = {key: value for key, value in state.kept.items() if key != MARK}
    return State({**state.shared, **made}, kept)


def directions(said: Tensors, module: str, before: np.ndarray) -> np.ndarray:
    """(r, k) orthonormal rows, greatest variance first, the greatest entry of each positive; where inputs
    have fewer directions, the rows of A before."""
    mean, second = (said[f"{module}.{what}"].astype(np.float64) for what in ("mean", "second"))
    size, vectors = np.linalg.eigh((second + second.T) / 2 - np.outer(mean, mean))
    rank = len(before)
    size, rows = size[::-1][:rank], vectors.T[::-1][:rank]
    signs = np.where(np.take_along_axis(rows, np.abs(rows).argmax(1)[:, None], 1) < 0, -1.0, 1.0)
    made = np.array(before, np.float32)
    there = np.flatnonzero(size > 1e-6 * max(size[0], 1e-12))
    made[there] = (rows * signs)[there]
    return made

"""The way down of whole numbers, against a twin that compares whole states: clients that come and go hold
what the server sent last."""

from __future__ import annotations

import numpy as np

from fedtune.transforms.downlink import HeldState
from fedtune.transforms.exact import changed_since, not_zero, recorded


def test_clients_that_were_away_for_any_number_of_rounds_hold_the_state() -> None:
    draw = np.random.default_rng(0)
    record: HeldState | None = None
    state: dict[str, np.ndarray] = {}
    clients: dict[int, tuple[int, dict[str, np.ndarray]]] = {}  # round, what it holds
    sent = plain = 0
    for number in range(1, 31):
        if number % 6 == 1:
            state[f"pool-{number:04d}"] = np.zeros(40, np.int32)
        newest = max(state)
        moved = draw.integers(0, 40, 6)
        state = {**state, newest: state[newest].copy()}
        state[newest][moved] += draw.integers(-2, 3, 6).astype(np.int32)  # back to zero at times
        record = recorded(record, state, number)
        for client in draw.choice(8, 3, replace=False).tolist():
            since, held = clients.get(client, (0, {}))
            marked = changed_since(record, since) if since else not_zero(state)
            got = {n: np.where(marked[n], v, held.get(n, np.zeros_like(v))) for n, v in state.items()}
            assert all(np.array_equal(got[n], v) for n, v in state.items())
            sent, plain = sent + sum(int(m.sum()) for m in marked.values()), plain + 40 * len(state)
            clients[client] = (number, got)
    assert sent < plain / 4


def test_a_record_begun_late_marks_everything_as_changed() -> None:
    """A run that was begun without one: nobody knows what its clients hold, a zero that was none before
    included."""
    record = recorded(None, {"a": np.int32([0, 3])}, 5)
    assert changed_since(record, 4)["a"].tolist() == [True, True] and changed_since(record, 5)[
        "a"
    ].tolist() == [False, False]
    record = recorded(record, {"a": np.int32([0, 0]), "b": np.int32([0, 1])}, 6)
    assert changed_since(record, 5)["a"].tolist() == [False, True] and changed_since(record, 5)[
        "b"
    ].tolist() == [False, True]

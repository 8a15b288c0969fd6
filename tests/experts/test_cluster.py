"""Clusters against planted groups and scikit-learn, assignments against all permutations, sketches against exact
cosines."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest

from fedtune.experts.cluster import assignment, clusters, cosines, linkage, matched, silhouette
from fedtune.experts.grouping import Clusters, Given
from fedtune.experts.sketch import sketch
from fedtune.rng import stream


def planted(groups: int, each: int, spread: float, seed: int, size: int = 64) -> dict[int, np.ndarray]:
    """Clients in turns of groups, whose directions are a centre and noise of `spread` times its length."""
    draw = stream("planted", seed)
    centres = draw.normal(size=(groups, size)) / np.sqrt(size)
    return {
        client: (centres[client % groups] + spread * draw.normal(size=size) / np.sqrt(size)).astype(
            np.float32
        )
        for client in range(groups * each)
    }


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("groups", [2, 3, 5])
def test_planted_groups_are_found(groups: int, seed: int) -> None:
    found = clusters(planted(groups, 4, 0.5, seed), most=8, least=3)
    assert found == [tuple(range(group, 4 * groups, groups)) for group in range(groups)]


@pytest.mark.parametrize("seed", range(5))
def test_clients_that_are_alike_or_all_different_are_not_told_apart(seed: int) -> None:
    alike = planted(1, 12, 0.5, seed, 1024)
    different = planted(12, 1, 0.0, seed, 1024)
    assert clusters(alike, 8, 3) == clusters(different, 8, 3) == []


def test_groups_below_the_least_are_none_and_the_budget_holds() -> None:
    whole = planted(4, 4, 0.3, 1)
    lone = {client: value for client, value in whole.items() if client % 4 != 3 or client == 3}
    assert clusters(lone, 8, 3) == [(0, 4, 8, 12), (1, 5, 9, 13), (2, 6, 10, 14)]
    assert len(clusters(planted(6, 3, 0.3, 2), most=3, least=3)) <= 3
    assert clusters({0: np.ones(4, np.float32)}, 8, 3) == []


@pytest.mark.parametrize("seed", range(5))
def test_linkage_and_silhouette_are_scikit_learns(seed: int) -> None:
    from sklearn.cluster import AgglomerativeClustering
    from sklearn.metrics import silhouette_score

    apart = np.maximum(1 - cosines(planted(3, 5, 1.0, seed)), 0)
    np.fill_diagonal(apart, 0)
    for groups in linkage(apart):
        labels = np.empty(len(apart), int)
        for number, group in enumerate(groups):
            labels[group] = number
        model = AgglomerativeClustering(len(groups), metric="precomputed", linkage="average")
        theirs = model.fit_predict(apart)
        assert {tuple(np.flatnonzero(theirs == label)) for label in set(theirs)} == {
            tuple(sorted(group)) for group in groups
        }
        assert silhouette(apart, groups) == pytest.approx(
            silhouette_score(apart, labels, metric="precomputed")
        )


@pytest.mark.parametrize("seed", range(20))
def test_an_assignment_is_the_best_of_all(seed: int) -> None:
    draw = stream("assignment", seed)
    rows, columns = draw.integers(1, 6, 2)
    gain = draw.integers(0, 9, (rows, columns))
    got = assignment(gain)
    taken = [column for column in got if column is not None]
    assert len(set(taken)) == len(taken) == min(rows, columns)
    wide = np.zeros((max(rows, columns),) * 2, int)
    wide[:rows, :columns] = gain
    best = max(
        sum(wide[row, column] for row, column in enumerate(order)) for order in permutations(range(len(wide)))
    )
    assert sum(gain[row, column] for row, column in enumerate(got) if column is not None) == best


def test_ids_follow_their_clients() -> None:
    old = {"e0": (0, 1, 2), "e1": (3, 4, 5)}
    assert matched([(3, 4, 0), (1, 2, 5)], old) == ["e1", "e0"]
    assert matched([(6, 7, 8), (0, 1, 2)], old) == ["", "e0"]


def test_a_new_grouping_keeps_ids_and_clients_that_hardly_move() -> None:
    by = Clusters(min_clients=3, hysteresis=0.2)
    first = planted(2, 4, 0.2, 3)
    groups, made = by.regroup(first, {}, 0)
    assert groups == {"e0": (0, 2, 4, 6), "e1": (1, 3, 5, 7)} and made == 2
    hardly = {**first, 0: np.float32(0.46 * first[2] + 0.54 * first[1])}
    assert by.regroup(hardly, groups, made) == (groups, 2)
    assert by.model_copy(update={"hysteresis": 0.0}).regroup(hardly, groups, made)[0]["e1"] == (0, 1, 3, 5, 7)
    gone = first | {client: planted(3, 5, 0.2, 3)[3 * client + 2] for client in (0, 2, 4)}
    after, count = by.regroup(gone | {8: first[1], 10: first[2], 12: first[2]}, groups, made)
    assert count == 3 and set(after) == {"e0", "e1", "e2"}  # an id is not used again
    assert by.joined(20, {**first, 20: first[3]}, groups) == "e1"
    assert by.joined(20, {**first, 20: -first[2] - first[3]}, groups) == ""


def test_the_order_of_clients_changes_nothing() -> None:
    known = planted(3, 4, 0.8, 5)
    backwards = {client: known[client] for client in sorted(known, reverse=True)}
    assert Clusters().regroup(known, {}, 0) == Clusters().regroup(backwards, {}, 0)


def test_given_groups_are_taken_in_turns() -> None:
    by = Given(by="given", groups=("a", "", "b"))
    assert [by.of(client, {}) for client in range(5)] == ["a", "", "b", "a", ""]


def test_a_sketch_keeps_cosines_has_length_one_and_noise_is_nobodys_to_draw_again() -> None:
    draw = stream("sketched", 1)
    one = {"a": draw.normal(size=(300, 8)), "b": draw.normal(size=(8, 300))}
    two = {name: 0.6 * value + 0.8 * draw.normal(size=value.shape) for name, value in one.items()}
    flat = [np.concatenate([part[name].ravel() for name in sorted(part)]) for part in (one, two)]
    exact = flat[0] @ flat[1] / np.linalg.norm(flat[0]) / np.linalg.norm(flat[1])
    made = [sketch(part, 1024, seed=7) for part in (one, two)]
    assert float(made[0] @ made[1]) == pytest.approx(exact, abs=0.1)
    assert all(np.linalg.norm(part) == pytest.approx(1, abs=1e-6) for part in made)
    assert np.array_equal(made[0], sketch(one, 1024, 7)) and not np.array_equal(made[0], sketch(one, 1024, 8))
    noisy = [sketch(one, 1024, 7, noise=0.5) - made[0] for _ in range(2)]
    assert not np.array_equal(*noisy) and np.std(noisy[0]) == pytest.approx(0.5, rel=0.15)
    assert not sketch({"a": np.zeros((3, 3))}, 16, 1).any()

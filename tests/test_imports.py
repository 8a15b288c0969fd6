"""Imports between the library's files have no cycles.

Lazy imports inside functions count. Those under TYPE_CHECKING, which never run, do not, nor does
fedtune/__init__.py, which imports its public names when
somebody asks for them (PEP 562).
"""

from __future__ import annotations

from collections.abc import Iterable
from graphlib import CycleError, TopologicalSorter

import grimp
import pytest

Edge = tuple[str, str]


@pytest.fixture(scope="module")
def edges() -> set[Edge]:
    """Who imports whom, as it happens when the program runs."""
    graph = grimp.build_graph("fedtune", exclude_type_checking_imports=True, cache_dir=None)
    return {
        (file, other)
        for file in graph.modules - {"fedtune"}
        for other in graph.find_modules_directly_imported_by(file)
    }


def cycle(edges: Iterable[Edge]) -> list[str]:
    """The files of one cycle, the first one again at its end; nothing if there is none."""
    order = TopologicalSorter[str]()
    for file, other in edges:
        order.add(file, other)
    try:
        order.prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_a_cycle_is_found() -> None:
    assert cycle([("a", "b"), ("b", "c"), ("a", "c")]) == []
    assert set(cycle([("a", "b"), ("b", "c"), ("c", "a")])) == {"a", "b", "c"}


def test_no_file_is_imported_by_what_it_imports(edges: set[Edge]) -> None:
    assert len(edges) > 500 and cycle(edges) == []

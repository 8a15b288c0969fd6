"""A method whose clients do something else than it says: liars, twins, watchers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from fedtune.methods import Verb, Work


class WithVerbs:
    """A method with other verbs; everything else is the method's own."""

    def __init__(self, method: Any, verbs: dict[str, Verb]) -> None:
        self._method, self.verbs = method, verbs

    def __getattr__(self, name: str) -> Any:
        return getattr(self._method, name)


def with_work(method: Any, changed: Callable[[Work], Work]) -> Any:
    """The method with every client's half changed."""
    return WithVerbs(
        method, {name: replace(verb, work=changed(verb.work)) for name, verb in method.verbs.items()}
    )

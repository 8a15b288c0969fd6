"""Balance between the tasks of one client."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field

from fedtune.rng import stream
from fedtune.selection.base import Holder, Row, Selection


class Group(Selection):
    """by = "group": rows are taken so often that the values of the column data.group have even shares; as
    many as there were, drawn with the run's seed, all of a value before any of them again (temperature-scaled
    mixing, Raffel et al. 2020, section 3.5.2)."""

    by: Literal["group"] = "group"
    tasks: ClassVar[frozenset[str]] = frozenset({"causal-lm", "instruct", "classify", "image-classify"})
    evenness: float = Field(1.0, ge=0, le=1)
    """A value with n rows gets a share in proportion to n^(1 - evenness): 1 makes shares the same, 0 leaves
    them."""

    def conflicts(self, recipe: Any) -> Iterator[tuple[str, str, str]]:
        yield from super().conflicts(recipe)
        if not recipe.data.group:
            yield "[[select]] by = 'group' without data.group", "a column", "set data.group"

    @property
    def idle(self) -> bool:
        return not self.evenness

    def choose(self, rows: Sequence[Row], holder: Holder) -> tuple[list[dict[str, Any]], str]:
        numbers: dict[str, list[int]] = {}
        for number, row in enumerate(rows):
            numbers.setdefault(row["group"], []).append(number)
        wanted = places({name: len(own) for name, own in numbers.items()}, self.evenness)
        taken: list[int] = []
        for name, own in sorted(numbers.items()):
            again, more = divmod(wanted[name], len(own))
            draw = stream(f"rows of group {name}", holder.seed, holder.id)
            taken += own * again + sorted(draw.permutation(own)[:more].tolist())
        shares = ", ".join(f"{name} {len(own)} > {wanted[name]}" for name, own in sorted(numbers.items()))
        return [dict(rows[number]) for number in sorted(taken)], f"rows by group: {shares}"


def places(counts: Mapping[str, int], evenness: float) -> dict[str, int]:
    """How many of all places each name gets: in proportion to count^(1 - evenness), by largest remainders,
    and at least one each.

    >>> places({"a": 7, "b": 1}, 1.0), places({"a": 7, "b": 1}, 0.0)
    ({'a': 4, 'b': 4}, {'a': 7, 'b': 1})
    """
    total, shares = sum(counts.values()), {name: n ** (1 - evenness) for name, n in counts.items()}
    exact = {name: total * share / sum(shares.values()) for name, share in shares.items()}
    made = Counter({name: max(1, int(value)) for name, value in exact.items()})
    rest = sorted(exact, key=lambda name: (int(exact[name]) - exact[name], name))
    for name in rest * 2:
        made[name] += made.total() < total
    return dict(made)

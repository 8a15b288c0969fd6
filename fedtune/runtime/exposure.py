"""Who sees what: read off the same declarations that the runtime obeys, so that it cannot drift from the
code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fedtune.methods import Method
from fedtune.methods.interface import Verb
from fedtune.runtime.task import chain_for, question_of
from fedtune.selection import Selection, telling
from fedtune.transforms.base import Chain


@dataclass(frozen=True)
class Exposure:
    """One row: what the server can see of a client's answer to a verb, and through which steps it came; or
    what somebody else sees beside that."""

    verb: str
    sees: str
    through: tuple[str, ...]


def exposure(method: Method, chain: Chain, tunable: Any, select: Sequence[Selection] = ()) -> list[Exposure]:
    """A row for each verb of the method that is asked of such a tunable model (or plan), and what else leaves
    a client; `select`: the recipe's selections of rows."""
    rows = [
        seen(verb, about, chain_for(about, chain).bound(question_of(verb, about, method)))
        for verb, about in method.verbs.items()
        if about.applies(tunable)
    ]
    also = beside(method, chain) | telling(select) | dict(method.capabilities.also_see)
    return rows + [Exposure(what, sees, ()) for what, sees in also.items()]


def seen(verb: str, about: Verb, chain: Chain) -> Exposure:
    """The row of one verb, whose answers go through this chain."""
    steps = chain.steps
    if about.reads_each:
        sees = "each client's answer, and uses it singly"
    else:
        total = "each group's sum" if about.by_group else "the sum"
        hidden = any(step.hides for step in steps)
        sees = f"{total} only" if hidden else f"each client's answer as it passes, uses {total} only"
    sees += "".join(f", {step.words}" for step in steps if step.words)
    sees += f" ({about.shows})" if about.shows else ""
    return Exposure(verb, sees, tuple(step.name for step in steps))


def beside(method: Method, chain: Chain) -> dict[str, str]:
    """What else leaves a client, whatever it is asked: the whole of it, as tests/hostile/test_exposure.py
    compares with what passes."""
    weight, masked = method.facts.weight, bool(chain.hides)
    figures = () if any(step.drops_figures for step in chain.steps) else method.facts.metrics
    named = "".join(f", {name}" for name in figures)
    cut = ", share of numbers that were cut" if any(step.name == "ring" for step in chain.steps) else ""
    whose = "all clients' sums" if masked else "each client's sums"
    own = {
        "scores": f"where the server has no rows to score on: {whose} over held-out rows, of "
        "accuracy or loss, and how many those are"
    }
    if masked:
        own |= {
            "figures": f"of masked answers, as sums over members only: weight ({weight}){named}{cut}; "
            "of others, in the clear, with what their chain chose; the bytes of each",
            "masks": "who came through which step of each sum; public keys and sealed shares, made for "
            "that sum alone; nothing of a sum that too few came through",
        }
    else:
        own |= {
            "figures": f"with each answer, in the clear: its weight ({weight}){named}, its "
            "bytes, what its chain chose"
        }
    return own | {
        "mistakes": "of a client that cannot answer: a code and a number; a real site keeps the sentence",
        "greeting": "of a real site, signed: its device and how many it has, cores, free memory and disk, "
        "speed, rows and bytes of its data, versions",
    }

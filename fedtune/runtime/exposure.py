"""Who sees what: read off the same declarations that the runtime obeys, so that it cannot drift from the
code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fedtune.methods import Method
from fedtune.runtime.task import chain_for
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
    rows = []
    for verb, about in method.verbs.items():
        if not about.applies(tunable):
            continue
        steps = chain_for(about, chain).steps
        if about.reads_each:
            sees = "each client's answer, and uses it singly"
        else:
            total = "each group's sum" if about.by_group else "the sum"
            hidden = any(s.hides for s in steps)
            sees = f"{total} only" if hidden else f"each client's answer as it passes, uses {total} only"
        sees += "".join(f", {step.words}" for step in steps if step.words)
        sees += f" ({about.shows})" if about.shows else ""
        rows.append(Exposure(verb, sees, tuple(s.name for s in steps)))
    figures = "" if any(step.drops_figures for step in chain.steps) else ", ".join(method.facts.metrics)
    also = beside(figures, method.facts.weight, bool(chain.hides)) | telling(select)
    rows += [Exposure(what, sees, ()) for what, sees in also.items()]
    rows += [Exposure(what, sees, ()) for what, sees in method.capabilities.also_see.items()]
    return rows


def beside(figures: str, weight: str, masked: bool = False) -> dict[str, str]:
    """What else leaves a client, whatever the method and the chain: the whole of it, as
    tests/hostile/test_exposure.py compares with what passes. `weight`: what that of an answer tells of its
    client; `masked`: answers that are summed are masked."""
    named = f", {figures}" if figures else ""
    whose = "all clients' sums" if masked else "each client's sums"
    own = {
        "scores": f"where the server has no rows to score on: {whose} over held-out rows, of "
        "accuracy or loss, and how many those are"
    }
    if masked:
        own |= {
            "figures": f"of masked answers, as sums over members only: weight ({weight}){named}, "
            "share of numbers that were cut; of others, in the clear, with what their chain chose; the "
            "bytes of each",
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

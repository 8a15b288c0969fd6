"""What a site demands for its own rows, whatever a recipe says: a greatest length of what leaves it, noise of
its own, and a largest epsilon over everything that it has ever answered.

HOME/privacy.db    a ledger of every answer, which only grows; `fedtune client --keep-days` does not touch it

Only noise that is added here counts: training by DP-SGD, the step "private" at the client, the site's own.
What a coordinator promises to add, a site cannot see.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np

from fedtune.config import Recipe
from fedtune.deploy.policy import Policy, forbidden
from fedtune.disk import disk_errors
from fedtune.model.settings import TrainSettings
from fedtune.privacy.accountant import spent
from fedtune.privacy.ledger import Ledger, Line
from fedtune.privacy.noise import Secret, add_gaussian
from fedtune.privacy.releases import Release
from fedtune.privacy.settings import asked_before
from fedtune.rules import tables_of
from fedtune.runtime.client_half import Cover
from fedtune.runtime.journal import sentences
from fedtune.runtime.masked_tasks import root_of, says_of_rows
from fedtune.runtime.site_scores import SCORE
from fedtune.transforms.bounded import factor_to, length
from fedtune.transforms.private import PrivateSettings
from fedtune.trust import Ticket
from fedtune.types import Tensors, Update

BOOK = "privacy.db"
TRAIN = "train"  # the verb that DP-SGD covers


def release(policy: Policy, recipe: Recipe, verb: str) -> Release:
    """What one answer shows of a row here, by what covers it. An answer of bounded length changes by at most
    twice its bound where a row changes it, so noise on whole answers counts half.

    A recipe as it travels was not checked for conflicts; here, those that a bound rests on are.
    """
    found = [policy.noise / 2] if policy.noise else []
    for step in recipe.chain:
        if isinstance(step, PrivateSettings) and step.place == "client" and not any(step.conflicts(recipe)):
            found.append(step.noise_multiplier / 2)
    if verb == SCORE:
        return Release("none", "example")
    if max(found, default=0.0):
        return Release("gaussian", "example", max(found))
    trains = [table for table in tables_of(recipe.method) if isinstance(table, TrainSettings)]
    first = None if verb == TRAIN else asked_before(recipe).get(verb)  # nothing bounds other answers
    rows = recipe.method.spends if verb == TRAIN else first.spends if first else None
    if rows and rows.noise and not any(any(t.private_conflicts(recipe)) for t in trains):
        return rows
    return Release("none", "example")


def require_within(policy: Policy, home: Path, recipe: Recipe, verb: str) -> None:
    """Before anything is computed. Raises F507 where an answer more would exceed `max_epsilon`, P901."""
    if not (policy.max_epsilon and says_of_rows(verb)):
        return
    lines = [line.release for line in book(home)]
    would = spent([*lines, release(policy, recipe, root_of(verb))], policy.delta)
    if not would.epsilon <= policy.max_epsilon:
        raise forbidden(
            f"{would} of a row here, over {len(lines) + 1} answers",
            f"at most {policy.max_epsilon:g} (max_epsilon)",
        )


def book(home: Path) -> Sequence[Line]:
    """Every charge so far. Raises R403, R404."""
    if not (home / BOOK).exists():
        return []
    with sentences(home / BOOK), closing(sqlite3.connect(home / BOOK, isolation_level=None)) as db:
        return Ledger(db).lines()


def charge(policy: Policy, home: Path, recipe: Recipe, about: Ticket, client: int, sha256: str) -> None:
    """Write an answer down before it leaves; the same bytes, sent again, are the same line. Raises R404."""
    if not says_of_rows(about.verb):
        return
    shown = release(policy, recipe, root_of(about.verb))
    with (
        disk_errors(home / BOOK),
        sentences(home / BOOK),
        closing(sqlite3.connect(home / BOOK, isolation_level=None)) as db,
    ):
        db.execute("PRAGMA synchronous=FULL")
        Ledger(db).charge([Line(client, about.round, shown, about.run, sha256)])


def cover(policy: Policy, verb: str = TRAIN, directed: bool = False) -> Cover | None:
    """What the site does to an answer before the recipe's chain has it; None: nothing. An answer of which
    only the direction counts becomes as long as may be."""
    if not policy.max_norm or not says_of_rows(verb) or root_of(verb) == SCORE:
        return None

    def covered(update: Update, near: Tensors | None) -> Update:
        whole = any(np.asarray(value).dtype.kind in "iu" for value in update.tensors.values())
        if whole or (near is None and not directed):
            what = "whole numbers" if whole else "an answer that is no difference to what was given"
            raise forbidden(
                f"{what}, whose length cannot be cut here", f"differences (max_norm = {policy.max_norm:g})"
            )
        moved = update if near is None else update.shifted(near, -1)
        values = {name: np.asarray(value) / update.weight for name, value in moved.tensors.items()}
        norm, secret, sigma = length(values), Secret(), policy.noise * policy.max_norm
        factor = factor_to(norm, policy.max_norm, directed)
        values = {name: add_gaussian(value * factor, sigma, secret) for name, value in values.items()}
        figures = {} if sigma else update.metrics
        made = replace(
            update, tensors={name: value * update.weight for name, value in values.items()}, metrics=figures
        )
        return made if near is None else made.shifted(near, +1)

    return covered

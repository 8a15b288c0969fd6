"""fedtune approve: at a site, who has approved which recipe, and what the recipe would do, in words.

HOME/approved.txt has a line for each approval: the recipe's hash, when, what it is called, by which user of
the machine. Where the policy says `approvals = 2`, two users must have approved (four eyes); one user twice
is one.
"""

from __future__ import annotations

import os
import pwd
from collections import defaultdict
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from fedtune.config import Recipe, method_of
from fedtune.deploy.sites import ROLES
from fedtune.disk import disk_errors
from fedtune.runtime.exposure import beside, seen
from fedtune.selection import telling
from fedtune.transforms import build

APPROVED = "approved.txt"  # in a site's home


def approvers(home: Path) -> dict[str, set[str]]:
    """Hash -> users who have approved it."""
    path, found = home / APPROVED, defaultdict[str, set[str]](set)
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        hash_, *more = line.split("\t")[0].split() or [""]
        found[hash_].add(line.split("\t")[-1] if "\t" in line else (more or [""])[-1])
    return found


def approved(home: Path, least: int = 1) -> frozenset[str]:
    """Hashes that so many users have approved."""
    return frozenset(hash_ for hash_, users in approvers(home).items() if hash_ and len(users) >= least)


def approve(home: Path, recipe: Recipe, name: str, user: str = "") -> set[str]:
    """Write down that this machine's user approves; all who have. Raises R404."""
    user = user or pwd.getpwuid(os.getuid()).pw_name
    with disk_errors(home):
        home.mkdir(parents=True, exist_ok=True)
        if user not in approvers(home)[recipe.fingerprint]:
            with (home / APPROVED).open("a", encoding="utf-8") as file:
                when = f"{datetime.now():%Y-%m-%dT%H:%M}"
                file.write(f"{recipe.fingerprint} {when} {' '.join(name.split())}\t{user}\n")
    return approvers(home)[recipe.fingerprint]


def in_words(recipe: Recipe) -> Iterator[str]:
    """What a site is asked for by a recipe, as a page for whoever has to decide on it. Reads neither model
    nor data."""
    method, data = method_of(recipe), recipe.data
    tree = recipe.method.model_dump()
    train = tree.get("train", tree)
    adapter = tree.get("adapter", {}).get("kind", "")
    named = data.model_dump()
    columns = [f"{role} '{named[role]}'" for role in (*ROLES[data.task], "group") if named.get(role)]
    yield f"recipe        {recipe.fingerprint}"
    revision = f", revision {recipe.model.revision}" if recipe.model.revision else ""
    yield f"model         {recipe.model.name}{revision}"
    yield f"method        {method.facts.title}" + (f"; trains '{adapter}'" if adapter else "")
    yield f"task          {data.task}, from columns {', '.join(columns) or 'of the source'}"
    if data.labels:
        some = ", ".join(data.labels[:12]) + (" ..." if len(data.labels) > 12 else "")
        yield f"labels        {len(data.labels)}: {some}"
    yield f"rounds        {recipe.rounds}; in each, {work_of(train)}"
    yield f"sites         {', '.join(recipe.deploy.sites) or 'every member'}"
    chain = build(recipe.chain)
    yield f"each answer   through {' > '.join(step.name for step in chain.steps) or 'nothing: as it is'}"
    for verb, about in method.verbs.items():
        yield f"{verb!r:<14}the coordinator sees {seen(verb, about, chain).sees}"
    for what, sees in (beside(method, chain) | telling(recipe.select)).items():
        yield f"{what:<14}{sees}"
    yield "not hidden    updates can reveal training data, the more, the fewer rows, steps and members"


def work_of(train: dict[str, object]) -> str:
    batch = train.get("batch")
    steps, epochs = train.get("steps"), train.get("epochs")
    if steps:
        return f"{steps} steps of {batch} rows"
    return (
        f"{epochs} passes over the rows in batches of {batch}"
        if epochs
        else f"work on batches of {batch} rows"
    )

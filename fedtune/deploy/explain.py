"""fedtune client --explain: in words, what would leave this house for a recipe or a ticket, and what its own
policy does to it. Reads neither model nor data, and asks nobody."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from fedtune.config import Recipe, read
from fedtune.deploy.approval import approved, in_words
from fedtune.deploy.policy import Asked, Policy
from fedtune.deploy.site_privacy import book, release, require_within
from fedtune.deploy.sites import Details, understood
from fedtune.errors import FedtuneError, Refused
from fedtune.privacy.accountant import spent
from fedtune.privacy.settings import asked_before
from fedtune.runtime.masked_tasks import root_of
from fedtune.trust import Signed, canonical
from fedtune.trust.ticket import FORMS, TAG


def explained(file: str, policy: Policy, home: Path) -> Iterator[str]:
    """Lines for whoever decides at the site. Raises C101 to C105."""
    recipe, verb = asked_for(file)
    yield from in_words(recipe)
    yield from own_demands(policy)
    for asked in [*(asked_before(recipe) if verb == "train" else ()), verb]:
        shown = spent([release(policy, recipe, asked)], policy.delta)
        yield f"of a row      {shown} for each answer to '{asked}', by noise added here"
    if lines := book(home):
        yield f"so far        {spent([line.release for line in lines], policy.delta)}, {len(lines)} answers"
    key = policy.coordinators[0] if policy.coordinators else ""
    try:
        policy.check(
            recipe, Asked(recipe.fingerprint, verb, key=key, approved=approved(home, policy.approvals))
        )
        require_within(policy, home, recipe, verb)
    except FedtuneError as error:
        yield f"policy        refuses it: {error}"
    else:
        yield "policy        allows it, as far as can be said without rows"


def asked_for(file: str) -> tuple[Recipe, str]:
    """The recipe and the verb of a ticket (JSON), whose signature is not looked at; of a recipe, its
    training. Raises C101 to C105."""
    try:
        content = Path(file).expanduser().read_bytes()
        ticket = canonical.part(TAG, Signed.from_json(content).record, FORMS)
    except (OSError, Refused):
        return read(file), "train"
    verb = str(ticket["verb"])
    return understood(Details.decode(str(ticket["details"])), verb), root_of(verb)


def own_demands(policy: Policy) -> Iterator[str]:
    """What the site does to every answer before the recipe's chain has it."""
    if policy.max_norm:
        yield f"cut here      to a length of {policy.max_norm:g} (max_norm)"
    if policy.noise:
        yield f"noise here    {policy.noise * policy.max_norm:g} on every number, and no loss beside it"

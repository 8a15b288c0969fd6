"""fedtune client --check: what would keep this site from taking part, said before it does. Trains nothing,
loads no model, leaves nothing behind."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from fedtune.config import Recipe
from fedtune.deploy.approval import approved
from fedtune.deploy.declared import declared
from fedtune.deploy.own_trainer import require_trainable
from fedtune.deploy.policy import Asked, read_policy
from fedtune.deploy.site_config import SiteConfig, require_own, with_own_model
from fedtune.deploy.sites import at_site, columns_of
from fedtune.errors import FedtuneError
from fedtune.exchange import ExchangeClient
from fedtune.exchange.tls_diagnosis import reason, unreachable
from fedtune.proxies import proxy_for
from fedtune.trust import Identity
from fedtune.trust.certificates import utc_now
from fedtune.trust.renewal import newest

AHEAD = 5.0  # seconds: what Flower takes of a clock that is ahead
SOON = 30  # days before a key's end that are said


def rehearsed(config: SiteConfig, recipe: Recipe | None) -> Iterator[str]:
    """A line for each thing that is well. Raises the first mistake: T701 to T706, C101 to C105, D201 to D206,
    E801, E802, F507, M301."""
    identity = newest(Path(config.keys), Path(config.home))
    days = (identity.peer.ends - utc_now()).days
    yield f"keys      '{identity.name.name}' of '{identity.name.federation}', {days} days left" + (
        "; renew them soon" if days < SOON else ""
    )
    policy = read_policy(config.policy)
    yield f"policy    {config.policy or 'none: the defaults hold'}"
    yield f"proxy     {proxy_for(config.coordinator) or 'none'}"
    yield from reached(config.coordinator, identity)
    require_own(config)
    if config.data:
        known = declared(config.data, config.shared)
        yield (
            f"data      {config.data}: at most {known.get('rows', 0):,} rows, {known.get('bytes', 0):,} "
            "bytes; so much is declared with the greeting"
        )
    if recipe is not None:
        here = with_own_model(recipe, config)
        here = here.model_copy(
            update={"deploy": recipe.deploy.model_copy(update={"sites": (identity.name.name,)})}
        )
        if config.trainer:
            require_trainable(recipe)
        columns = columns_of(config.columns)
        mine = at_site(here, 0, config.data, config.partition, columns, config.shared).clients[0]
        yield f"rows      {len(mine.train):,} to train on, {len(mine.test):,} held out, by this recipe"
        policy.check(
            recipe,
            Asked(
                recipe=recipe.fingerprint,
                key=policy.coordinators[0] if policy.coordinators else "",
                approved=approved(Path(config.home), policy.approvals),
            ),
        )
        policy.check_rows(recipe, len(mine.train))
        yield (
            f"recipe    allowed here: {recipe.method.type}, {recipe.rounds} rounds, fingerprint "
            f"{recipe.fingerprint[:16]}"
        )


def reached(coordinator: str, identity: Identity) -> Iterator[str]:
    """The way to the coordinator, and its clock. Raises E801, E802, T704 to T706."""
    if why := reason(identity, coordinator):
        raise why
    if not proxy_for(coordinator) and (nobody := unreachable(coordinator)):
        raise FedtuneError(
            "E801",
            f"nobody who answers at {coordinator} ({nobody})",
            "the coordinator",
            "check the address, the firewall, and that it runs",
        )
    with tempfile.TemporaryDirectory() as folder:
        client = ExchangeClient(coordinator, identity, Path(folder), patience=5.0)
        try:
            began, now = time.time(), client.status().now
        finally:
            client.close()
    ahead = (began + time.time()) / 2 - now
    if ahead > AHEAD:
        raise FedtuneError(
            "T704",
            f"a clock that is {ahead:.0f} s ahead of the coordinator's",
            f"at most {AHEAD:.0f} s",
            "set this machine's clock (NTP)",
        )
    yield f"port      {coordinator} answers, and takes these keys"
    yield f"clock     {ahead:+.1f} s from the coordinator's"

"""A stolen key of the coordinator is no longer good at a site that has the authority's newer list, and no
older list brings it back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from fedtune.cli import main
from fedtune.config import Recipe
from fedtune.deploy.fleet_proxy import FleetProxy, behind
from fedtune.deploy.members import Members
from fedtune.trust import load
from fedtune.trust.authority import create, open_authority, revoke
from fedtune.trust.roster import FILE, pin, read, version_of
from tests.deploy.flowers import body, headers
from tests.exchange.federation import Federation
from tests.hostile.coordinator import Taken, taken
from tests.hostile.wires import Recorder


@pytest.fixture
def hostile(tiny_bert: Path, tmp_path: Path) -> Any:
    with taken(tmp_path / "taken", tiny_bert) as made:
        yield made


@pytest.fixture(autouse=True)
def room(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()


def test_a_revoked_key_of_the_coordinator_is_no_longer_good_at_a_site(hostile: Taken) -> None:
    authority, home = hostile.made.authority, hostile.made.root / "home-site-a"
    worker = hostile.worker()
    assert hostile.asks(worker)["code"] == "W604"  # it listens: this ticket's base model is made up
    stolen = hostile.identity  # and in use by somebody else from here on
    authority.renew("coordinator", 30)
    revoke(authority.place("coordinator"), "coordinator", stolen.peer.key[:16])
    authority.publish(30)
    newer = (authority.place("coordinator") / FILE).read_bytes()
    pin(home, newer, stolen.authority, "hospitals", 0)
    assert hostile.asks(worker)["code"] == "T706"
    hostile.identity = load(authority.place("coordinator"))
    assert hostile.asks(worker)["code"] == "W604"  # the new one is heard


def test_the_list_reaches_a_site_with_its_ordinary_calls(tmp_path: Path) -> None:
    link, federation = Recorder(), Federation(tmp_path)
    federation.server.stop(0)
    listed = federation.coordinator.folder / FILE
    gateway = federation.start(also=[behind(link.address, Members(tmp_path), roster=listed)], threads=4)
    home = tmp_path / "home"
    home.mkdir()
    shutil.copy(listed, federation.sites["site-a"].folder / FILE)
    fleet_proxy = FleetProxy(federation.sites["site-a"], gateway.address, home=home)
    try:
        before = fleet_proxy.members
        for _ in range(2):
            fleet_proxy.pass_on(
                "POST", "/v1/fleet/pull-messages", list(headers().items()), body("pull-messages")
            )
        assert not (home / FILE).exists()
        assert open_authority(federation.authority.folder).publish(30) == before + 1
        fleet_proxy.pass_on("POST", "/v1/fleet/pull-messages", list(headers().items()), body("pull-messages"))
        assert fleet_proxy.members == before + 1 and (home / FILE).read_bytes() == listed.read_bytes()
        assert b"fedtune-members" not in bytes(link.streams[-1])  # Flower never sees it
    finally:
        fleet_proxy.close()
        gateway.stop(0)
        federation.server_store.close()
        link.close()


def test_a_revocation_is_published_where_the_authority_is_at_hand(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = tmp_path / "keys"
    create(keys, "hospitals", ["localhost"], 30).issue("site-a", 30)
    before = version_of(keys / "coordinator" / FILE)
    assert (
        main(["keys", "revoke", "site-a", "--keys", str(keys)]) == 0
        and f"version {before + 1} " in capsys.readouterr().out
    )
    shutil.move(keys / "authority", tmp_path / "offline")
    create(tmp_path / "k2", "hospitals", ["localhost"], 30)
    assert (
        "site-a"
        not in read(
            (keys / "coordinator" / FILE).read_bytes(), load(keys / "coordinator").authority, "hospitals"
        ).members.values()
    )


def test_only_recipes_that_the_authority_names_are_run(hostile: Taken, tmp_path: Path) -> None:
    """Whoever has the coordinator's machine and its key cannot approve one; renewals and revocations leave the
    approved ones what they are."""
    authority, home = hostile.made.authority, hostile.made.root / "home-site-a"
    worker = hostile.worker()
    recipe, other = hostile.recipe(), hostile.recipe(rounds=2)
    named = Recipe.model_validate_json(json.dumps(recipe)).fingerprint
    command = ["keys", "publish", "--keys", str(authority.folder)]
    assert main([*command, "--recipe", named]) == 0
    authority.issue("site-d", 30)  # publishes, too
    newest = (authority.place("coordinator") / FILE).read_bytes()
    pin(home, newest, hostile.identity.authority, "hospitals", 0)
    assert (
        hostile.asks(worker, recipe)["code"] == "W604"
    )  # its made-up base is the last thing that is looked at
    assert hostile.asks(worker, other)["code"] == "F507"
    assert main([*command, "--recipe", "all"]) == 0
    pin(
        home, (authority.place("coordinator") / FILE).read_bytes(), hostile.identity.authority, "hospitals", 0
    )
    assert hostile.asks(worker, other)["code"] == "W604"

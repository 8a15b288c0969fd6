"""Keys of weeks renew themselves; nobody gets a certificate of a name that is not his by it, and nobody's site
goes over to keys that are somebody else's."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from fedtune.cli import main
from fedtune.deploy import fleet_proxy as proxies
from fedtune.deploy.client import Renewal
from fedtune.deploy.fleet_proxy import FleetProxy, behind
from fedtune.deploy.members import Members
from fedtune.errors import FedtuneError
from fedtune.exchange import ExchangeClient
from fedtune.trust import Identity, load, renewal, requests
from fedtune.trust.authority import create, revoke
from fedtune.trust.certificates import utc_now
from fedtune.trust.renewal import Desk
from fedtune.trust.signed import Signed
from tests.deploy.flowers import body, headers
from tests.exchange.federation import Federation
from tests.hostile.wires import Recorder

PULL = "/v1/fleet/pull-messages"


class Gateway:
    """A coordinator's gateway with a desk for requests, and a site whose keys have five of thirty days left."""

    def __init__(self, root: Path) -> None:
        self.federation, self.link = Federation(root), Recorder()
        self.federation.server.stop(0)
        self.authority = self.federation.authority
        self.keys = self.authority.issue("site-d", 30, now=utc_now() - timedelta(days=25))
        self.site = load(self.keys)
        self.desk, self.home = Desk(root / "renewals"), root / "home-d"
        self.home.mkdir()
        self.server = self.federation.start(
            also=[
                behind(
                    self.link.address,
                    Members(root),
                    renewals=lambda peer, content: self.desk.hand_in(
                        peer, content, self.federation.coordinator
                    ),
                )
            ],
            threads=4,
        )

    def signs(self) -> int:
        """The operator's timer."""
        keys, at = str(self.authority.folder), str(self.desk.folder)
        return main(["keys", "renewals", "--keys", keys, "--at", at, "--days", "42"])

    def close(self) -> None:
        self.server.stop(0)
        self.federation.server_store.close()
        self.link.close()


@pytest.fixture
def gateway(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gateway]:
    monkeypatch.setattr(proxies, "HANDED", 0.0)
    made = Gateway(tmp_path)
    yield made
    made.close()


def called(proxy: FleetProxy) -> None:
    proxy.pass_on("POST", PULL, list(headers().items()), body("pull-messages"))


def test_a_site_goes_over_to_new_keys_by_itself(gateway: Gateway, capsys: pytest.CaptureFixture[str]) -> None:
    """Its private keys are made at the site and stay there; the old ones may be revoked then."""
    said: list[str] = []
    proxy = FleetProxy(gateway.site, gateway.server.address, home=gateway.home)
    keys = Renewal(gateway.site, gateway.home, said.append)
    try:
        assert not keys.look(proxy) and "end in 4 days" in said[0]
        called(proxy)
        assert not keys.look(proxy) and (gateway.desk.folder / "site-d.request").exists()
        assert gateway.signs() == 0 and "site-d.request: signed for 42 days" in capsys.readouterr().out
        assert gateway.signs() == 0 and "signed" not in capsys.readouterr().out  # once
        called(proxy)
        assert keys.look(proxy) and "are renewed" in said[-1]
    finally:
        proxy.close()
    new = renewal.newest(gateway.keys, gateway.home)
    assert new.peer.key != gateway.site.peer.key and (new.peer.ends - utc_now()).days == 41
    assert new.folder.parent == gateway.home / "keys" and not (gateway.home / "keys" / "next").exists()
    private = {path.read_bytes() for path in new.folder.glob("*key.pem")}
    carried = [*gateway.desk.folder.iterdir(), *gateway.authority.place("coordinator").iterdir()]
    assert len(private) == 2 and not any(part in path.read_bytes() for part in private for path in carried)
    assert b"fedtune-renewal" not in b"".join(map(bytes, gateway.link.streams))  # Flower never sees it
    revoke(gateway.authority.place("coordinator"), "site-d", gateway.site.peer.key)
    for identity, works in ((new, True), (gateway.site, False)):
        client = ExchangeClient(gateway.server.address, identity, gateway.home / identity.peer.key[:8], 2.0)
        if works:
            assert client.status().newest_protocol
        else:
            with pytest.raises(FedtuneError, match="T706"):
                client.status()
        client.close()
    assert renewal.asked(new, gateway.home) == b""  # and rests until a third is left


def request_of(identity: Identity, root: Path, name: str) -> bytes:
    """A request for new keys of any name."""
    path, _ = requests.make(root / "made", identity.name.federation, name)
    return path.read_bytes()


def test_a_site_takes_no_keys_that_are_none(gateway: Gateway, tmp_path: Path) -> None:
    """The coordinator hands on what it likes: of another authority, of another name, for other keys, torn."""
    wanted = renewal.asked(gateway.site, gateway.home)
    stranger = create(tmp_path / "else", "hospitals", ["localhost"], 30)
    record = Signed.from_json(wanted).record
    _, foreign = stranger.sign(record, 42)
    other = request_of(gateway.site, tmp_path / "other", "site-d")
    _, for_others = gateway.authority.sign(other, 42)
    _, of_another = gateway.authority.sign(request_of(gateway.site, tmp_path / "another", "site-x"), 42)
    mixed = json.loads(gateway.authority.sign(record, 42)[1]) | {
        "authority": json.loads(foreign)["authority"]
    }
    before = {path: path.read_bytes() for path in gateway.home.rglob("*") if path.is_file()}
    for bad in (foreign, for_others, of_another, json.dumps(mixed).encode(), b"", b"{}", b"[1]"):
        proxy: Any = type("Answered", (), {"renewed": bad, "request": b""})()
        said: list[str] = []
        keys = Renewal(gateway.site, gateway.home, said.append)
        assert not keys.look(proxy), bad
        assert not bad or "keys that are none: T70" in said[-1], said
        assert renewal.newest(gateway.keys, gateway.home).peer == gateway.site.peer
    assert before == {path: path.read_bytes() for path in gateway.home.rglob("*") if path.is_file()}

"""Who takes part, what a site allows, and what the coordinator's numbers say."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from fedtune.config import Recipe
from fedtune.deploy.metrics import Refusals, serve_metrics
from fedtune.deploy.policy import Asked, Policy, read_policy
from fedtune.deploy.sites import Details, at_coordinator, at_site, resolved
from fedtune.errors import FedtuneError, Refused
from fedtune.events import Event
from fedtune.exchange.events import CallRefused
from fedtune.trust.authority import Authority, create, revoke
from fedtune.trust.certificates import utc_now
from tests import small
from tests.exchange.federation import Federation
from tests.waiting import PATIENCE, free_ports


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """site-a and site-b may speak; site-c was revoked, site-d has expired."""
    made = create(tmp_path_factory.mktemp("keys") / "keys", "hospitals", ["localhost"], 30)
    for name in ("site-b", "site-a", "site-c"):
        made.issue(name, 30)
    made.issue("site-d", 1, now=utc_now() - timedelta(days=3))
    revoke(made.place("coordinator"), "site-c")
    return made


def recipe(**changes: Any) -> Recipe:
    return small.recipe(Path("bert"), Path("rows.jsonl"), **{"data__labels": sorted(small.WORDS), **changes})


def test_the_sites_are_those_that_may_speak_now_in_the_order_of_their_names(authority: Authority) -> None:
    keys = authority.place("coordinator")
    assert resolved(recipe(), keys).deploy.sites == ("site-a", "site-b")
    assert resolved(recipe(deploy__sites=["site-b", "site-a"]), keys).deploy.sites == ("site-b", "site-a")
    assert (
        resolved(recipe(), keys).fingerprint == recipe().fingerprint
    )  # who answers is no part of a run's identity


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"deploy__sites": ["site-a", "site-c"]},
            r"F502: found deploy.sites with 'site-c', which has no valid key, expected some of site-a, site-b",
        ),
        ({"deploy__sites": ["site-d"]}, "F502: found deploy.sites with 'site-d'"),
        ({"deploy__sites": ["site-a", "site-a"]}, "C104: found deploy.sites with a name twice"),
        (
            {"deploy__data": "partition"},
            r"C104: found partition.clients = 4 beside 2 sites \(site-a, site-b\).*use --set "
            r"partition.clients=2",
        ),
    ],
)
def test_a_recipe_that_asks_for_others_is_refused_before_it_begins(
    changes: dict[str, Any], sentence: str, authority: Authority
) -> None:
    with pytest.raises(FedtuneError, match=sentence):
        resolved(recipe(**changes), authority.place("coordinator"))


def test_without_a_client_there_is_no_run(tmp_path: Path) -> None:
    made = create(tmp_path / "keys", "hospitals", ["localhost"], 30)
    with pytest.raises(
        FedtuneError,
        match="F502: found no client with a valid key, expected one or more; run: fedtune keys issue NAME",
    ):
        resolved(recipe(), made.place("coordinator"))


def test_each_side_holds_its_own_rows_only(tmp_path: Path) -> None:
    """site-b brings a CSV file where the recipe speaks of JSONL."""
    mine, test = tmp_path / "mine.csv", tmp_path / "test.jsonl"
    mine.write_text("text,label\n" + "".join(f"{row['text']},{row['label']}\n" for row in small.rows(10)))
    test.write_text("".join(json.dumps(row) + "\n" for row in small.rows(7)))
    told = recipe(deploy__sites=["site-a", "site-b"], deploy__test=str(test), data__client_test_share=0.0)
    site, coordinator = at_site(told, 1, str(mine)), at_coordinator(told)
    assert (
        [len(c.train) for c in site.clients] == [0, 10] and not site.test and site.clients[1].name == "site-b"
    )
    assert (
        [len(c.train) for c in coordinator.clients] == [0, 0]
        and len(coordinator.test) == 7
        and coordinator.labels == site.labels
    )
    with pytest.raises(FedtuneError, match=r"D201: found no data of this site.*fedtune client --data FILE"):
        at_site(told, 0, "")
    with pytest.raises(FedtuneError, match=r"D206: found no data.labels"):
        at_coordinator(told.model_copy(update={"data": told.data.model_copy(update={"labels": ()})}))


def test_the_details_of_a_ticket_survive_their_way_and_damage_is_refused() -> None:
    details = Details('{"seed": 3}', 2, 3, (0, 2), 4, False, {"token": "x"})
    assert Details.decode(details.encode()) == details
    for text in (
        "",
        "[]",
        "{}",
        details.encode()[:-1],
        details.encode().replace('"number":2', '"number":"two"'),
    ):
        with pytest.raises(Refused, match="W601: found a ticket whose details cannot be read"):
            Details.decode(text)


# --- policy ---


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('methods = ["fedkseed"]', "F507: found method 'fedpeft', expected one of fedkseed"),
        ('models = ["/models/llama"]', "F507: found base model 'bert', expected one of /models/llama"),
        ('require = ["sign"]', "F507: found a message chain without 'sign'"),
        ("update_bytes = 999", "F507: found updates of up to 1000 bytes, expected at most 999"),
    ],
)
def test_a_policy_forbids_what_it_does_not_name(text: str, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "policy.toml").write_text(text)
    with pytest.raises(FedtuneError, match=sentence):
        read_policy(str(tmp_path / "policy.toml")).check(recipe(), Asked(budget=1000))


def test_a_policy_allows_what_it_names_and_no_policy_everything(tmp_path: Path) -> None:
    (tmp_path / "policy.toml").write_text(
        'methods = ["fedpeft"]\nmodels = ["bert"]\nrequire = ["sign"]\nupdate_bytes = 1000\n'
    )
    read_policy(str(tmp_path / "policy.toml")).check(recipe(chain=[{"step": "sign"}]), Asked(budget=1000))
    assert read_policy("") == Policy()
    Policy().check(recipe(), Asked(budget=1 << 40))


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("methods = [", "C103"),
        ("method = []", "C101"),
        ("update_bytes = -1", "C102"),
        ('methods = "fedpeft"', "C102"),
        (None, "C105"),
    ],
)
def test_a_policy_that_cannot_be_read_is_a_sentence(text: str | None, code: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "policy.toml").write_text(text)
    with pytest.raises(FedtuneError, match=code):
        read_policy(str(tmp_path / "policy.toml"))


# --- metrics ---


def test_the_endpoint_counts_what_the_exchange_took(tmp_path: Path) -> None:
    federation = Federation(tmp_path)
    port = free_ports(1)[0]
    told: list[Event] = []
    refusals = Refusals(told.append)
    server = serve_metrics(f"127.0.0.1:{port}", federation.server, tmp_path, refusals)
    try:
        client = federation.client("site-a")
        client.send(federation.ticket("site-a"), b"x" * 1234)
        client.close()
        refused = [CallRefused("Push", "site-b", code, f"{code}: no") for code in ("T706", "W604", "W604")]
        for event in refused:
            refusals(event)
        assert told == refused[:2]  # the same again says nothing new: it is counted
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=PATIENCE) as answer:
            assert answer.headers["content-type"] == "text/plain; version=0.0.4"
            lines = answer.read().decode().splitlines()
        samples = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        assert (
            samples['fedtune_round{run="run-1"}'] == "1"
            and samples['fedtune_round_asked{run="run-1"}'] == "2"
        )
        assert (
            samples['fedtune_round_accepted{run="run-1"}'] == "1"
            and samples['fedtune_round_bytes{run="run-1"}'] == "1234"
        )
        assert samples["fedtune_members_present"] == "1" and samples["fedtune_uploads"] == "0"
        assert (
            samples['fedtune_refused_total{code="W604"}'] == "2"
            and samples['fedtune_refused_total{code="T706"}'] == "1"
        )
        assert int(samples["fedtune_disk_free_bytes"]) > 0 and not any("site-a" in line for line in lines)
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=PATIENCE)
        with pytest.raises(FedtuneError, match=rf"E801: found metrics address '127.0.0.1:{port}'"):
            serve_metrics(f"127.0.0.1:{port}", federation.server, tmp_path, refusals)
        with pytest.raises(FedtuneError, match="E801: found metrics address 'nowhere'"):
            serve_metrics("nowhere", federation.server, tmp_path, refusals)
    finally:
        server.shutdown()
        server.server_close()
        federation.close()

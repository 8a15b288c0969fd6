"""A coordinator and three sites as real programs: the bytes of a local run, whatever travels, and nobody in
who should not be."""

from __future__ import annotations

import re
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from fedtune.deploy.fleet_proxy import NAME
from fedtune.exchange.tls import secure_channel
from fedtune.trust import load
from fedtune.trust.authority import create, revoke
from fedtune.wire.v1 import fleet_pb2
from tests.e2e.deploying import MEMORY, SITES, Deployment, deployed, held, local
from tests.e2e.test_flower import journal
from tests.waiting import PATIENCE, free_ports

pytestmark = [pytest.mark.timeout(900), pytest.mark.thorough]
OPEN = "fedtune.exchange.server_store:ServerStore.open_round"
KSEED: dict[str, Any] = {
    "method": {"type": "fedkseed", "size": 256, "estimator": "spsa", "steps": 4, "batch": 4, "lr": 1e-3},
    "rounds": 2,
}


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """Three sites that stay, whatever the coordinator is asked to run: a hospital does not start its client
    anew for each study."""
    with deployed(tmp_path_factory.mktemp("deploy")) as made:
        made.join_all()
        yield made
        print(made.logs())  # pytest shows it where a test failed


def fedtune(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fedtune", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE,
    )


def same(federation: Deployment, name: str, root: Path, model: Path, data: Path, **changes: Any) -> None:
    alone, result = local(root, model, data, **changes)
    assert federation.folder(name).read_json("result.json")["state_sha256"] == result["state_sha256"]
    assert journal(federation.folder(name)) == journal(alone)


def test_lora_on_real_sites_ends_with_the_bytes_of_a_local_run(
    federation: Deployment, tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    """With clients that remember (error feedback), a model that is loaded once, and somebody who looks on and
    may or may not."""
    metrics = f"127.0.0.1:{free_ports(1)[0]}"
    with held(OPEN, tmp_path, "after", "args[2] == 3") as point:
        federation.serve(
            federation.recipe("lora", tiny_bert, data, **MEMORY), "--metrics", metrics, points=[point]
        )
        federation.wait(Path(point["marker"]).exists, "round 3, open")
        asked_while_it_runs(federation, metrics, tmp_path)
    assert federation.ended() == 0
    same(federation, "lora", tmp_path / "local", tiny_bert, data, **MEMORY)
    for site in SITES:
        assert [e["event"] for e in federation.worker_events(site)].count("WorkspaceBuilt") == 1
    seen = fedtune("status", str(federation.folder("lora").path))
    assert seen.stdout.startswith("lora: round 3 of 3, finished\n"), seen.stdout


def asked_while_it_runs(federation: Deployment, metrics: str, folder: Path) -> None:
    """Metrics, the status for whoever may see it, and refusals for everybody else, while round 3 is open and
    nobody has been asked."""
    coordinator, authority = federation.authority.place("coordinator"), federation.authority
    with urllib.request.urlopen(f"http://{metrics}/metrics", timeout=PATIENCE) as answer:
        assert re.search(rb'^fedtune_round_asked\{run="lora-[0-9a-f]+"\} 3$', answer.read(), re.M)
    for keys in (coordinator, authority.place("site-a")):
        seen = fedtune("status", "--server", federation.address, "--keys", str(keys))
        assert seen.returncode == 0 and re.search(r"^ *lora: round 2 of 3, ", seen.stdout, re.M), (
            seen.stdout + seen.stderr
        )
    stranger = create(folder / "keys", "hospitals", ["localhost"], 30).issue(
        "site-a", 30
    )  # the right names, of an authority of its own
    refused = fedtune("status", "--server", federation.address, "--keys", str(stranger))
    assert (
        refused.returncode == 2
        and "T705: found a coordinator of another authority" in refused.stderr
        and not refused.stdout
    )
    with secure_channel(load(authority.place("site-a")), federation.address) as channel:
        call = channel.unary_unary(
            f"/{NAME}/Call", fleet_pb2.FleetRequest.SerializeToString, fleet_pb2.FleetReply.FromString
        )
        for path in (
            "/v1/control/start-run",
            "/v1/fleet/pull-messages",
        ):  # which starts code on every node; of a node that says not which it is
            with pytest.raises(grpc.RpcError) as refusal:
                call(fleet_pb2.FleetRequest(method="POST", path=path), timeout=PATIENCE)
            assert "E806" in refusal.value.details()


def test_integers_only_on_the_same_sites(
    federation: Deployment, tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    """Another coordinator, days later, with another method; the sites were there all the time."""
    workers = federation.pids("worker")
    # a SuperNode asks every 3 s, and a gateway may be back in less: only who has missed it has seen it go
    federation.wait(
        lambda: all("the coordinator is away" in federation.said(site) for site in SITES),
        "sites that noticed",
    )
    federation.serve(federation.recipe("kseed", tiny_bert, data, **KSEED))
    assert federation.ended() == 0
    same(federation, "kseed", tmp_path / "local", tiny_bert, data, **KSEED)
    assert sorted(federation.pids("worker")) == sorted(workers) and len(workers) == 3
    assert all("the coordinator is away" in federation.said(site) for site in SITES)


def test_a_policy_keeps_its_site_out_and_a_revoked_key_is_told_so(
    federation: Deployment, tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    """site-b allows integers only; site-c's key is no longer good."""
    policy = federation.root / "policy.toml"
    policy.write_text('methods = ["fedkseed"]\n')
    assert federation.leave("site-b") == 0
    federation.join("site-b", "--policy", str(policy))
    revoke(federation.authority.place("coordinator"), "site-c")
    with held(OPEN, tmp_path, "after") as point:
        federation.serve(
            federation.recipe("few", tiny_bert, data, rounds=1, partition__clients=2), points=[point]
        )
        federation.wait(lambda: "T706" in federation.said("site-c"), "a sentence for site-c")
        refused = fedtune(
            "status", "--server", federation.address, "--keys", str(federation.authority.place("site-c"))
        )
    assert refused.returncode == 2 and "T706: " in refused.stderr and not refused.stdout
    assert federation.ended() == 0
    answers = [row for row in journal(federation.folder("few")) if len(row) == 7]
    assert [row[2] for row in answers] == ["ok", "F507"] and "F507: at 'site-b'" in answers[1][6]
    assert (
        "F507: found method 'fedpeft', expected one of fedkseed" in federation.said("site-b")
        and "fedkseed" not in answers[1][6]
    )

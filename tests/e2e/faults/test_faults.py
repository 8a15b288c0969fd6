"""Faults of processes, networks, disks and people; each ends with the bytes of an undisturbed run, or of one
without whom it cost the round."""

from __future__ import annotations

import signal
import socket
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import transformers

from fedtune.errors import ClientFailed
from fedtune.runtime.local import local_transport
from fedtune.runtime.protocol import Ask, Link, Reply, Transport
from fedtune.runtime.workspace import Workspace
from tests import small, tiny
from tests.e2e.deploying import MEMORY, SITES, Deployment, held, lines_of, local, point
from tests.e2e.faults.conftest import Oracle, counts
from tests.e2e.test_flower import journal
from tests.exchange.federation import Proxy

slow = pytest.mark.slow
pytestmark = pytest.mark.timeout(900)
TRAINED = "fedtune.runtime.client_half:require_finite"  # in a worker: after training, before anything is kept


def noted(federation: Deployment, name: str = "run") -> list[str]:
    """What the journal says of answers that did not count."""
    return [row[6] for row in journal(federation.folder(name)) if len(row) == 7 and row[6]]


@slow
def test_a_worker_and_a_run_that_die_and_a_coordinator_that_is_stopped(
    federation: Deployment, oracle: Oracle, tmp_path: Path
) -> None:
    """The short form of this folder: a site's worker is killed after training, the run before it commits
    round 2, and then the operator stops it all."""
    dies = point("fedtune.runtime.journal:Journal.commit", tmp_path / "commit", when="args[1] == 2")
    with held(
        "fedtune.exchange.server_store:ServerStore.open_round", tmp_path, when="args[2] == 3"
    ) as stands:
        federation.serve(oracle.recipe(federation), points=[dies, stands])
        for site in SITES:
            federation.join(site, points=[point(TRAINED, tmp_path / "trained")])  # whoever comes first
        federation.wait(Path(stands["marker"]).exists, "round 3, about to open")
        assert (tmp_path / "commit").exists() and (tmp_path / "trained").exists()
        assert federation.leave("server") == 0
    assert f"stopped; go on with: fedtune resume {federation.folder('run').path}" in federation.said("server")
    assert not federation.pids("gateway") + federation.pids("superlink")
    federation.wait(
        lambda: not federation.pids("serverapp"), "the end of the run's process, which looks once a second"
    )
    federation.resume("run")
    assert federation.ended() == 0
    oracle.same(federation)
    assert f"{federation.folder('run').path}: 3 clients, 3 rounds, going on after round 2" in federation.said(
        "server"
    )


# --- people ---


@slow
def test_clients_that_are_stopped_and_started_again(federation: Deployment, oracle: Oracle) -> None:
    federation.serve(oracle.recipe(federation))
    federation.join_all()
    for number, site in enumerate(SITES, 1):
        federation.wait_accepted(3 * number - 2)
        assert federation.leave(site) == 0 and not federation.pids(who=site)
        assert "stopped; what was finished and not sent stays in the site's folder" in federation.said(site)
        federation.join(site)
    assert federation.ended() == 0
    oracle.same(federation)


@slow
def test_below_the_quorum_the_run_pauses_with_exit_code_75_until_it_is_resumed(
    federation: Deployment, oracle: Oracle
) -> None:
    federation.serve(oracle.recipe(federation, deploy__quorum=1.0, deploy__deadline=90.0))
    federation.join("site-a")
    federation.join("site-b")
    assert federation.ended() == 75
    said = federation.said("server")
    assert (
        "R409: found 2 usable answers in round 1 (missing: client-2), expected 3 (deploy.quorum)" in said
        and "fedtune resume" in said
    )
    assert counts(federation) == 2 and not federation.pids("gateway")
    federation.join("site-c")
    federation.resume("run")
    assert federation.ended() == 0
    oracle.same(federation)


@slow
def test_a_coordinator_that_is_away_for_two_minutes(federation: Deployment, oracle: Oracle) -> None:
    """SIGKILL to the one process that looks after all others, in the middle of round 2; its children end with
    it, the clients wait."""
    recipe = oracle.recipe(federation)
    federation.serve(recipe)
    federation.join_all()
    federation.wait_accepted(4)
    federation.running["server"].kill()
    federation.running.pop("server").wait()
    time.sleep(120)
    assert {
        who
        for role in ("gateway", "superlink", "serverapp", "superexec")
        for who in federation.pids(role, "server")
    } == set()
    assert all(
        "the coordinator is away" in federation.said(site) and federation.running[site].poll() is None
        for site in SITES
    )
    federation.serve(recipe)
    assert federation.ended() == 0
    oracle.same(federation)


# --- slow ones ---


@slow
@pytest.mark.parametrize("role", ["supernode", "worker", "superlink", "serverapp", "gateway"])
def test_a_process_that_stands_still_for_75_seconds(
    role: str, federation: Deployment, oracle: Oracle
) -> None:
    """Longer than Flower's patience of 60 s with a node or a run."""
    federation.serve(oracle.recipe(federation))
    federation.join_all()
    federation.wait_round("run", 1)
    who = "site-b" if role in ("supernode", "worker") else ""
    assert len(federation.kill(role, who, signal.SIGSTOP)) == 1
    time.sleep(75)
    federation.kill(role, who, signal.SIGCONT)
    assert federation.ended() == 0
    oracle.same(federation)


def without(client: int, number: int, code: str) -> Any:
    """A local transport in which one client fails in one round."""

    def carry(link: Link, workspace: Workspace) -> Transport:
        real = local_transport(link, workspace.client, workspace.done)

        def asked(asks: Sequence[Ask]) -> Iterable[Reply]:
            yield from real([ask for ask in asks if (ask.client, ask.now.number) != (client, number)])
            yield from (
                Reply(ask.client, failure=ClientFailed(code, "a", "b", "c"))
                for ask in asks
                if (ask.client, ask.now.number) == (client, number)
            )

        return asked

    return carry


def left_out(federation: Deployment, oracle: Oracle, root: Path, client: int, number: int, code: str) -> None:
    """All is as in a local run in which that client failed in that round."""
    recipe = small.recipe(oracle.model, oracle.data, **{"partition__clients": 3, **MEMORY})
    alone, result, _ = small.play(recipe, root, carry=without(client, number, code))
    assert federation.folder("run").read_json("result.json")["state_sha256"] == result["state_sha256"]
    outcome = [row[:3] for row in journal(federation.folder("run"))[3:]]
    assert outcome == [row[:3] for row in journal(alone)[3:]] and (number, client, code) in outcome


@slow
def test_a_client_beyond_the_deadline_is_left_out_of_that_round_only(
    federation: Deployment, oracle: Oracle, tmp_path: Path
) -> None:
    federation.serve(oracle.recipe(federation, deploy__deadline=100.0))
    sleepy = point(TRAINED, tmp_path / "slept", when="calls == 2", do="__import__('time').sleep(130)")
    for site in SITES:
        federation.join(site, points=[sleepy] if site == "site-c" else [])
    assert federation.ended() == 0
    left_out(federation, oracle, tmp_path / "local", 2, 2, "F503")
    assert noted(federation)[0].startswith(
        "F503: found no answer within 100 s (its ticket is out), expected an answer"
    )
    refused = [path.read_text() for path in (federation.root / "home-site-c" / "spool").glob("*.refused")]
    assert len(refused) == 1 and refused[0].startswith(
        ("W604: found an update for round 2, which is closed", "W604: found 'train' of round 2")
    )
    assert counts(federation) == 8


@slow
@pytest.mark.parametrize(
    ("at", "do", "code", "words"),
    [
        (
            TRAINED,
            "[value.fill(float('nan')) for value in args[0].tensors.values()]",
            "W607",
            "W607: at 'site-b', number",
        ),  # an honest client
        (
            "fedtune.wire.message:sealed",
            "setattr(args[0], 'weight', float('nan'))",
            "W607",
            "W607: found",
        ),  # one that is not
    ],
)
def test_a_client_that_trained_to_nothing_is_left_out_of_that_round_only(
    at: str, do: str, code: str, words: str, federation: Deployment, oracle: Oracle, tmp_path: Path
) -> None:
    federation.serve(oracle.recipe(federation))
    for site in SITES:
        federation.join(
            site, points=[point(at, tmp_path / "nan", when="calls == 2", do=do)] if site == "site-b" else []
        )
    assert federation.ended() == 0
    found = next(row[2] for row in journal(federation.folder("run"))[3:] if row[2] != "ok")
    assert found.startswith(code) and noted(federation)[0].startswith(words)
    left_out(federation, oracle, tmp_path / "local", 1, 2, found)


# --- networks ---


class Cable(Proxy):
    """A line to the gateway that can be cut: what is under way breaks, and whoever calls is hung up on."""

    def __init__(self, upstream: str) -> None:
        self.whole, self.ends = True, set[socket.socket]()
        super().__init__(upstream)

    def _pump(self, source: socket.socket, target: socket.socket, counts: bool) -> None:
        self.ends |= {source, target}
        if self.whole:
            super()._pump(source, target, counts)
        for end in (source, target):
            end.close()
        self.ends -= {source, target}

    def cut(self) -> None:
        self.whole = False
        for end in list(self.ends):
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue

    def heal(self) -> None:
        self.whole = True


@slow
@pytest.mark.parametrize("seconds", [20, 80])
def test_a_network_that_is_cut_and_healed(seconds: int, federation: Deployment, oracle: Oracle) -> None:
    """For one site, in the middle of round 2; 80 s are longer than Flower waits for a node."""
    cable = Cable(federation.address)
    federation.serve(oracle.recipe(federation))
    for site in SITES:
        federation.join(site, address=cable.address if site == "site-a" else "")
    federation.wait_round("run", 1)
    cable.cut()
    time.sleep(seconds)
    assert "the coordinator is away" in federation.said("site-a").rpartition("there")[
        2
    ] or "away" in federation.said("site-a")
    cable.heal()
    assert federation.ended() == 0
    oracle.same(federation)
    cable.close()


@pytest.fixture(scope="module")
def wide_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base whose whole update is 1.6 MB, seven pieces of the exchange."""
    folder = tiny.bert(tmp_path_factory.mktemp("wide"))
    config = transformers.AutoConfig.from_pretrained(folder)
    config.hidden_size, config.intermediate_size = 128, 512
    return tiny.save(transformers.BertModel, config, folder)


@slow
@pytest.mark.parametrize("at", ["fedtune.exchange.uploads:write", "fedtune.exchange.client:packed"])
def test_an_upload_that_breaks_in_its_middle_goes_on_from_there(
    at: str, federation: Deployment, wide_bert: Path, data: Path, tmp_path: Path
) -> None:
    """The gateway dies at a piece that it has written, or the worker at a piece that it is about to send."""
    changes: dict[str, Any] = {"method__adapter": {"kind": "full"}, "rounds": 2}
    broken = point(at, tmp_path / "broken", "after" if "uploads" in at else "before", when="calls == 4")
    federation.serve(
        federation.recipe("run", wide_bert, data, **changes), points=[broken] if "uploads" in at else []
    )
    for site in SITES:
        federation.join(site, points=[broken] if "client" in at and site == "site-b" else [])
    assert federation.ended() == 0 and (tmp_path / "broken").exists()
    alone, result = local(tmp_path / "local", wide_bert, data, **changes)
    assert federation.folder("run").read_json("result.json")["state_sha256"] == result["state_sha256"]
    assert journal(federation.folder("run")) == journal(alone) and counts(federation) == 6
    taken = [
        e
        for e in lines_of(federation.root / "runs" / ".coordinator" / "gateway.jsonl")
        if e["event"] == "UpdateAccepted"
    ]
    assert [e["resumed"] > 0 for e in taken].count(True) >= 1

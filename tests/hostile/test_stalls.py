"""Nobody holds up the others: not a member that was shut out or has left, not a node that was made up, not a
connection that says nothing."""

from __future__ import annotations

import hashlib
import secrets
import socket
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedtune.deploy import transport
from fedtune.deploy.members import NODES
from fedtune.deploy.metrics import AT_ONCE, Refusals, serve_metrics
from fedtune.exchange.client import NAME
from fedtune.exchange.connections import network
from fedtune.exchange.tls import SERVER_OPTIONS, secure_channel
from fedtune.runtime.journal import Journal
from fedtune.trust.authority import revoke
from fedtune.wire.v1 import exchange_pb2 as pb
from tests.deploy.conducting import notes, outcomes
from tests.deploy.inside import FakeGrid, inside
from tests.e2e.deploying import MEMORY
from tests.exchange.federation import Federation
from tests.waiting import PATIENCE, wait_for


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "AGAIN", 0.3)
    monkeypatch.setattr(transport, "PAUSE", 0.02)
    monkeypatch.setattr(transport, "GRACE", 0.5)
    monkeypatch.setattr("fedtune.flower.nodes.LOOK_SECONDS", 0.02)


def silent_from(node: int, first: int, until: int = 1 << 30) -> Any:
    """A node that takes its tickets of these rounds and never answers."""
    seen: list[int] = []

    def instead(asked: int, message: Any) -> Any:
        if asked != node or message.metadata.message_type != "train.ticket":
            return ...
        seen.append(1)
        return None if first <= len(seen) < until else ...

    return instead


def test_a_revoked_member_is_out_now(tiny_bert: Path, data: Path, tmp_path: Path) -> None:
    """In the middle of a round, with an hour of deadline left."""
    with inside(tmp_path, tiny_bert, data, rounds=2, deploy__deadline=3600.0, **MEMORY) as made:

        def instead(node: int, message: Any) -> Any:
            if node == 102 and message.metadata.message_type == "train.ticket":
                revoke(made.keys, "site-b")
                return None
            return ...

        began = time.monotonic()
        made.conduct(FakeGrid(made.workers(), instead))
        assert time.monotonic() < began + 120
        assert outcomes(made.folder) == {
            (1, 0): "ok",
            (1, 1): "T706",
            (1, 2): "ok",
            (2, 0): "ok",
            (2, 1): "T706",
            (2, 2): "ok",
        }
        assert "'site-b' has no valid key" in notes(made.folder)[0]


@pytest.mark.thorough
def test_a_member_that_stays_away_is_asked_and_not_waited_for_and_comes_back_by_itself(
    tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    """Two rounds cost their deadline; the others nothing. In round 5 it answers again, and counts."""
    with inside(tmp_path, tiny_bert, data, rounds=6, deploy__deadline=4.0, **MEMORY) as made:
        made.conduct(grid := FakeGrid(made.workers(), silent_from(102, 1, 5)))
        got = [outcomes(made.folder)[number, 1] for number in range(1, 7)]
        assert got == ["F503"] * 4 + ["ok", "ok"] and grid.pushed.count((102, "train.ticket")) == 6
        assert (
            "no answer within 4 s" in notes(made.folder)[1]
            and "no answer to the last 3 questions" in notes(made.folder)[2]
        )


def test_where_nobody_answers_everybody_is_waited_for(
    tiny_bert: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedtune.errors import FedtuneError

    with inside(tmp_path, tiny_bert, data, rounds=1, deploy__deadline=2.0, **MEMORY) as made:
        began = time.monotonic()
        with pytest.raises(FedtuneError, match="R405"):
            made.conduct(
                FakeGrid(
                    made.workers(), lambda node, m: None if m.metadata.message_type == "train.ticket" else ...
                )
            )
        assert time.monotonic() > began + 2.0


@pytest.mark.thorough
def test_a_set_that_was_closed_stays_closed(
    tiny_bert: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The coordinator dies between the end of a question and its commit; a member that was late may not come
    in by that: whoever can end a process could choose who is in a sum."""
    with inside(tmp_path, tiny_bert, data, rounds=2, deploy__deadline=4.0, **MEMORY) as made:
        with monkeypatch.context() as dying:

            def dies(*args: Any) -> None:
                raise RuntimeError("the power is gone")

            dying.setattr(Journal, "commit", dies)
            with pytest.raises(RuntimeError, match="power"):
                made.conduct(FakeGrid(made.workers(), silent_from(102, 1)))
        made.conduct(FakeGrid(made.workers()))
        got = outcomes(made.folder)
        assert [got[1, client] for client in range(3)] == ["ok", "F503", "ok"]
        assert [got[2, client] for client in range(3)] == ["ok", "ok", "ok"]
        assert "was left out before this run's process was started again" in notes(made.folder)[0]


def test_nodes_that_are_nobodys_cost_nothing(tiny_bert: Path, data: Path, tmp_path: Path) -> None:
    """The gateway has written down which node is whose; a thousand others are neither greeted nor told of."""
    with inside(tmp_path, tiny_bert, data, rounds=1, **MEMORY) as made:
        workers = made.workers()
        home = made.root / "runs" / ".coordinator"
        (home / NODES).write_text(
            '{"site-a": ["k1", 101], "site-b": ["k2", 102], "site-c": ["k3", 103], "stranger": ["k4", 7]}'
        )
        grid = FakeGrid(workers | dict.fromkeys(range(1000, 2000), workers[101]) | {7: workers[101]})
        made.conduct(grid)
        assert {node for node, _ in grid.pushed} == {101, 102, 103} and set(
            outcomes(made.folder).values()
        ) == {"ok"}


# --- connections and calls that say nothing ---


def test_one_address_has_so_many_connections_and_the_others_come_in(tmp_path: Path) -> None:
    """A flood of silent connections from 127.0.0.2, with fewer descriptors than a real gateway has."""
    federation = Federation(tmp_path, connections=8)
    flood: list[socket.socket] = []
    try:
        port = int(federation.server.address.rpartition(":")[2])
        there = federation.client("site-a")
        assert there.status().newest_protocol
        for _ in range(100):
            flood.append(socket.create_connection(("127.0.0.1", port), 30, ("127.0.0.2", 0)))
        wait_for(lambda: federation.server.connections.refused >= 92, "what is too much is shut down")
        assert federation.server.connections.look()["127.0.0.2"] <= 8
        assert there.status().newest_protocol  # who was there
        new = federation.client("site-b")
        assert new.status().newest_protocol  # and who comes
        new.close(), there.close()
    finally:
        for silent in flood:
            silent.close()
        federation.close()


def test_addresses_of_one_customer_are_one() -> None:
    assert network("192.0.2.7") == network("::ffff:192.0.2.7") != network("192.0.2.8")
    assert network("2001:db8:1:2::7") == network("2001:db8:1:2:ffff::1") != network("2001:db8:1:3::7")
    assert network("fe80::1%eth0") == network("fe80::2")


def test_calls_that_say_nothing_hold_no_threads(tmp_path: Path) -> None:
    """gRPC waits for the message of a call in a thread of its own before it asks anybody: 600 such calls of
    one member would be all threads."""
    federation = Federation(tmp_path, stall_seconds=3.0)
    silence = threading.Event()

    def nothing() -> Iterator[bytes]:
        silence.wait(120)
        yield from ()

    channel = secure_channel(federation.sites["site-a"], federation.server.address, alone=True)
    try:
        calls = []
        for method in ("Status", "Fetch"):
            say = channel.stream_unary(f"/{NAME}/{method}", bytes, bytes)
            calls += [say.future(nothing()) for _ in range(300)]
        other = federation.client("site-b")
        began = time.monotonic()
        assert other.status().newest_protocol and time.monotonic() < began + 20
        wait_for(lambda: all(call.done() for call in calls), "all of them to be ended")
        assert federation.codes().count("E804") > 500  # told at once that it asks too much
        other.close()
    finally:
        silence.set()
        channel.close()
        federation.close()


def test_one_member_does_not_take_all_places_for_downloads(tmp_path: Path) -> None:
    """It begins sixteen downloads and reads none of them."""
    federation, state = Federation(tmp_path), secrets.token_bytes(16 << 20)
    federation.open(2, state=state)
    channel = secure_channel(federation.sites["site-a"], federation.server.address, alone=True)
    fetch = channel.unary_stream(f"/{NAME}/Fetch", pb.FetchRequest.SerializeToString, pb.Piece.FromString)
    try:
        request = pb.FetchRequest(run="run-1", sha256=hashlib.sha256(state).digest())
        held = [fetch(request) for _ in range(16)]
        wait_for(lambda: federation.codes().count("E804") >= 14, "the ones that are too many")
        other = federation.client("site-b")
        began = time.monotonic()
        assert other.fetch(federation.ticket("site-b", 2, state=state)) == state
        assert time.monotonic() < began + 25
        for one in held:
            one.cancel()
        other.close()
    finally:
        channel.close()
        federation.close()


@pytest.mark.slow
def test_a_connection_that_says_nothing_is_cut_soon(tmp_path: Path) -> None:
    federation = Federation(tmp_path)
    try:
        port = int(federation.server.address.rpartition(":")[2])
        began = time.monotonic()
        with socket.create_connection(("localhost", port), 60) as silent:
            silent.settimeout(60)
            assert not silent.recv(1 << 16) or not silent.recv(1)
        assert time.monotonic() < began + 30
    finally:
        federation.close()


def test_the_time_that_a_silent_connection_has_is_bounded() -> None:
    assert dict(SERVER_OPTIONS)["grpc.server_handshake_timeout_ms"] <= 10_000


def test_small_doors_have_so_many_callers_and_so_much_time(tmp_path: Path) -> None:
    """Of the metrics' endpoint: a caller that says a byte a second, and more of them than there are places."""
    federation = Federation(tmp_path)
    http = serve_metrics("127.0.0.1:0", federation.server, tmp_path, Refusals(federation.told.append))
    http.seconds = 3.0
    port = http.server_address[1]
    began = time.monotonic()
    flood = [socket.create_connection(("127.0.0.1", port), 30) for _ in range(AT_ONCE + 20)]
    try:
        slow = flood[0]
        slow.settimeout(0.3)

        def cut() -> bool:
            try:
                slow.sendall(b"G")
                return not slow.recv(1)
            except TimeoutError:
                return False
            except OSError:
                return True

        wait_for(cut, "the end of a caller that takes too long", every=0.2)
        assert time.monotonic() > began + 2.0
        wait_for(lambda: not http._open, "all places are free again")
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=PATIENCE) as answer:
            assert b"fedtune_members_present" in answer.read()
    finally:
        for one in flood:
            one.close()
        http.shutdown()
        federation.close()

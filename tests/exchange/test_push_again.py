"""Updates that come late: connections that break, members that stall, spools that wait or rot."""

from __future__ import annotations

import hashlib
import os
import threading
from pathlib import Path
from typing import Any

import grpc
import pytest

from fedtune.errors import FedtuneError
from fedtune.exchange.limits import CHUNK
from fedtune.trust.authority import revoke
from fedtune.wire.v1 import exchange_pb2 as pb
from tests.exchange.federation import Federation, proxied, push, said
from tests.exchange.pushing import SMALL, UPDATE, code_of, events, split
from tests.waiting import PATIENCE, wait_for


def test_a_spool_that_was_lost_goes_on_counting(federation: Federation) -> None:
    push(federation.client(), said(federation, SMALL, sequence=500), split(SMALL))
    federation.open(2)
    fresh = federation.client()
    assert (
        fresh.send(federation.ticket(number=2), SMALL).row == 2
        and (fresh.outbox.folder / "sequence").read_text() == "501"
    )


def test_a_connection_that_breaks_is_continued_where_it_broke(federation: Federation) -> None:
    data = os.urandom(12 << 20)
    with proxied(federation) as proxy:
        proxy.cut_at = [6 << 20, 11 << 20]
        client = federation.client(address=proxy.address)
        got = client.send(federation.ticket(), data)
    (event,) = events(federation)
    assert (
        proxy.cuts == 2
        and got.payload == hashlib.sha256(data).hexdigest()
        and federation.server_store.read("run-1", 1, "train", "site-a") == data
    )
    assert event.resumed > 1 << 20 and proxy.up < 1.6 * len(data)  # what had arrived was not sent again


def test_an_update_waits_in_the_spool_while_nobody_answers(federation: Federation) -> None:
    with proxied(federation) as proxy:
        client = federation.client(address=proxy.address, patience=0.5)
        proxy.cut_at = [1] * 1000
        with pytest.raises(FedtuneError, match="E801"):
            client.send(federation.ticket(), UPDATE)
        client.close()
        assert not federation.server_store.accepted("run-1", 1, "train")
        proxy.cut_at = []
        again = federation.client(address=proxy.address)  # the process was started anew
        got = again.held(federation.ticket())  # nothing is computed a second time
    assert (
        got is not None
        and federation.server_store.read("run-1", 1, "train", "site-a") == UPDATE
        and not list(again.outbox.waiting())
    )


def test_a_spooled_update_that_was_damaged_is_computed_again(federation: Federation) -> None:
    client, ticket = federation.client(), federation.ticket()
    for damage in (UPDATE[:-1] + b"x", UPDATE[:-1]):
        client.outbox.keep(ticket, UPDATE).path.write_bytes(damage)
        assert client.held(ticket) is None
    assert client.send(ticket, UPDATE).row == 1


def test_flush_sends_what_is_wanted_and_drops_what_is_not(federation: Federation) -> None:
    client = federation.client()
    federation.open(2)
    for number in (1, 2):
        client.outbox.keep(federation.ticket(number=number), SMALL + bytes([number]))
    federation.server_store.close_round("run-1", 1, "train")
    assert [got.round for got in client.flush()] == [2] and not client.flush()
    (reason,) = client.outbox.folder.glob("*.refused")
    assert "W604" in reason.read_text()


def test_renewed_keys_sign_a_spooled_update_again(federation: Federation) -> None:
    from fedtune.trust import load

    client = federation.client()
    client.outbox.keep(federation.ticket(), SMALL)
    client.close()
    federation.sites["site-a"] = load(federation.authority.renew("site-a", 30))
    got = federation.client().held(federation.ticket())
    assert got is not None and got.row == 1


def test_one_upload_a_client_and_a_second_connection_replaces_a_dead_one(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedtune.exchange.uploads.IDLE", 60.0)  # the machine of the tests may be slow
    client, gate = federation.client(), threading.Event()
    first = said(federation, UPDATE)

    def slowly() -> Any:
        yield pb.PushRequest(
            offer=pb.Offer(envelope=first.encode(), signature=client.identity.sign(first.encode()))
        )
        yield pb.PushRequest(piece=pb.Piece(data=UPDATE[:CHUNK]))
        gate.wait(PATIENCE)

    hanging = client._push(slowly())
    wait_for(
        lambda: any(upload.written == CHUNK for upload in federation.server.service.uploads.active.values()),
        "a first piece",
    )
    federation.open(2)
    other = said(federation, SMALL, round=2, sequence=2)
    assert code_of(lambda: push(federation.client(), other, split(SMALL))) == "E804"
    replies = push(federation.client(), first, split(UPDATE[CHUNK:]))  # the same update over a new connection
    assert replies[0].offset == CHUNK and replies[-1].HasField("receipt")
    gate.set()
    with pytest.raises(grpc.RpcError):
        list(hanging)
    assert federation.server_store.read("run-1", 1, "train", "site-a") == UPDATE


def test_who_is_revoked_during_an_upload_does_not_count(federation: Federation) -> None:
    client, gate = federation.client(), threading.Event()
    envelope = said(federation, UPDATE)

    def requests() -> Any:
        yield pb.PushRequest(
            offer=pb.Offer(envelope=envelope.encode(), signature=client.identity.sign(envelope.encode()))
        )
        yield pb.PushRequest(piece=pb.Piece(data=UPDATE[:CHUNK]))
        gate.wait(PATIENCE)
        for piece in split(UPDATE[CHUNK:]):
            yield pb.PushRequest(piece=piece)

    call = client._push(requests(), timeout=PATIENCE)
    wait_for(lambda: federation.server.service.uploads.active, "an upload")
    revoke(federation.authority.place("coordinator"), "site-a")
    gate.set()
    assert code_of(lambda: list(call)) == "T706" and not federation.server_store.accepted("run-1", 1, "train")


def test_slots_run_out_and_everybody_gets_a_turn(tmp_path: Path) -> None:
    federation = Federation(tmp_path, uploads=1)
    try:
        threads, got = [], []
        clients = [federation.client(name) for name in ("site-a", "site-b")]
        for client, name in zip(clients, ("site-a", "site-b"), strict=True):
            threads.append(
                threading.Thread(
                    target=lambda c=client, n=name: got.append(c.send(federation.ticket(n), UPDATE))
                )
            )
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
        assert len(got) == 2 and len(federation.server_store.accepted("run-1", 1, "train")) == 2
    finally:
        federation.close()


def test_who_stalls_loses_the_slot_and_not_the_bytes(tmp_path: Path) -> None:
    federation = Federation(tmp_path, uploads=1, stall_seconds=0.4)
    try:
        client, gate = federation.client("site-b"), threading.Event()
        envelope = said(federation, UPDATE, "site-b")

        def requests() -> Any:
            yield pb.PushRequest(
                offer=pb.Offer(envelope=envelope.encode(), signature=client.identity.sign(envelope.encode()))
            )
            yield pb.PushRequest(piece=pb.Piece(data=UPDATE[:CHUNK]))
            gate.wait(PATIENCE)

        call = client._push(requests())
        wait_for(lambda: federation.server.service.uploads.active, "an upload")
        assert (
            federation.client().send(federation.ticket(), SMALL).row == 1
        )  # the other one waits for the slot, not for ever
        with pytest.raises(grpc.RpcError):
            list(call)
        gate.set()
        assert push(federation.client("site-b"), envelope, split(UPDATE[CHUNK:]))[0].offset == CHUNK
    finally:
        federation.close()


def test_no_member_takes_all_threads_and_silence_is_cut(tmp_path: Path) -> None:
    federation = Federation(tmp_path, calls=3, stall_seconds=0.4)
    try:
        a, gate = federation.client(), threading.Event()

        def nothing() -> Any:
            gate.wait(PATIENCE)
            yield from ()

        silent = [a._push(nothing()) for _ in range(3)]
        wait_for(lambda: federation.server.door._busy["site-a"] == 3, "three calls")
        assert code_of(lambda: a._status(pb.StatusRequest(), timeout=PATIENCE)) == "E804"
        assert federation.client("site-b").status().uploads == 0  # the others do not notice
        for call in silent:
            with pytest.raises(grpc.RpcError):
                list(call)
        gate.set()
        assert a.send(federation.ticket(), SMALL).row == 1
    finally:
        federation.close()

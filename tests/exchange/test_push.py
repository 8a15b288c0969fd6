"""Updates up: each counts once or is refused with a sentence, and what breaks is continued."""

from __future__ import annotations

import hashlib
import itertools
import os
import time
import zlib
from pathlib import Path

import grpc
import psutil
import pytest

from fedtune.errors import FedtuneError, Refused
from fedtune.exchange.limits import CHUNK
from fedtune.trust import receipt
from fedtune.wire.v1 import exchange_pb2 as pb
from tests.exchange.federation import BASE, Federation, offer_of, proxied, push, said
from tests.exchange.pushing import SMALL, UPDATE, code_of, events, split
from tests.waiting import PATIENCE


def test_an_update_is_safe_before_its_receipt_is_given(federation: Federation) -> None:
    client = federation.client()
    got = client.send(federation.ticket(), UPDATE)
    assert (got.run, got.round, got.client, got.verb, got.size, got.row) == (
        "run-1",
        1,
        "site-a",
        "train",
        len(UPDATE),
        1,
    )
    assert got.payload == hashlib.sha256(UPDATE).hexdigest() and abs(got.accepted / 1e6 - time.time()) < 60
    (update,) = federation.server_store.accepted("run-1", 1, "train")
    assert (update.client, update.payload, update.row) == ("site-a", got.payload, 1)
    assert federation.server_store.read("run-1", 1, "train", "site-a") == UPDATE
    assert not list((federation.folder / "exchange" / "incoming").iterdir())
    assert {path.suffix for path in client.outbox.folder.iterdir()} == {
        ".receipt",
        "",
    }  # the update itself is no longer kept
    assert client.held(federation.ticket()) == got  # without a word to the server
    (status,) = client.status().rounds
    assert (status.run, status.round, status.open, status.asked, status.accepted, status.bytes) == (
        "run-1",
        1,
        True,
        2,
        1,
        len(UPDATE),
    )


def test_the_same_update_again_has_the_same_receipt_and_another_one_is_refused(
    federation: Federation,
) -> None:
    client = federation.client()
    first = said(federation, SMALL)
    answers = [push(client, first, split(SMALL))[-1].receipt for _ in range(2)]
    assert (
        answers[0] == answers[1] and len(push(client, first, [])) == 1
    )  # no byte is asked for a second time
    retrained = said(
        federation, SMALL, sequence=2
    )  # the same bytes, signed anew by a client that lost its outbox
    assert push(client, retrained, [])[-1].receipt == answers[0]
    assert code_of(lambda: push(client, said(federation, b"other", sequence=3), split(b"other"))) == "E805"
    assert len(events(federation)) == len(federation.server_store.accepted("run-1", 1, "train")) == 1


ALTERED = {
    "protocol": (2, "W602"),
    "federation": ("other", "T705"),
    "run": ("run-2", "E806"),
    "round": (2, "W604"),
    "client": ("site-b", "T705"),
    "verb": ("score", "W604"),
    "base": ("c" * 64, "W604"),
    "given": ("d" * 64, "W604"),
    "size": (1 << 40, "W606"),
    "sequence": (0, "W605"),
    "payload": ("e" * 64, "W601"),
}


@pytest.mark.parametrize("name", ALTERED)
def test_an_envelope_that_is_not_what_was_asked_is_refused_and_takes_nothing(
    name: str, federation: Federation
) -> None:
    """Signed by the client itself: what its signature cannot catch."""
    value, code = ALTERED[name]
    client = federation.client()
    assert code_of(lambda: push(client, said(federation, SMALL, **{name: value}), split(SMALL))) == code
    assert not federation.server_store.accepted("run-1", 1, "train") and not list(
        (federation.folder / "exchange" / "incoming").iterdir()
    )
    assert client.send(federation.ticket(), SMALL).row == 1  # it may still do it right


def test_messages_of_others_and_old_ones_are_refused(federation: Federation) -> None:
    a, b, c = (federation.client(f"site-{name}") for name in "abc")
    assert (
        code_of(lambda: push(b, said(federation, SMALL), split(SMALL), signer=a.identity)) == "T707"
    )  # stolen from the wire
    assert (
        code_of(lambda: push(c, said(federation, SMALL, "site-c"), split(SMALL))) == "E806"
    )  # keys, but no part in the run
    sent = said(federation, SMALL, sequence=7)
    push(a, sent, split(SMALL))
    federation.open(2)
    assert (
        code_of(lambda: push(a, said(federation, SMALL, round=2, sequence=7), split(SMALL))) == "W605"
    )  # a count is used once
    federation.server_store.close_round("run-1", 2, "train")
    assert (
        code_of(lambda: push(a, said(federation, SMALL, round=2, sequence=8), split(SMALL))) == "W604"
    )  # closed
    federation.server_store.close_round("run-1", 1, "train")
    federation.server_store.release("run-1", 1)
    assert push(a, sent, [])[-1].HasField("receipt")  # whoever lost a receipt gets it even now
    assert code_of(lambda: push(b, said(federation, SMALL, "site-b"), split(SMALL))) in ("W604", "E806")


def test_streams_that_are_not_as_declared_are_refused(federation: Federation) -> None:
    client = federation.client()
    bomb = pb.Piece(data=zlib.compress(bytes(64 << 20), 9), deflated=True)
    for number, (pieces, code) in enumerate([
        (split(SMALL + b"more"), "W606"),
        (split(SMALL[:-1] + b"x"), "W601"),
        (split(SMALL[:-1]), "E808"),
        ([bomb], "W606"),
        ([pb.Piece(data=b"junk", deflated=True)], "W601"),
        ([pb.Piece(data=zlib.compress(SMALL)[:-2], deflated=True)], "W601"),
    ]):  # fmt: skip
        assert (
            code_of(lambda p=pieces, n=number: push(client, said(federation, SMALL, sequence=n + 1), p))
            == code
        ), code  # type: ignore[misc]
    stub = client.channel.stream_stream(
        "/fedtune.wire.v1.Exchange/Push", pb.PushRequest.SerializeToString, pb.PushReply.FromString
    )
    for requests in ([], [pb.PushRequest(piece=pb.Piece(data=b"x"))], [pb.PushRequest()]):
        assert code_of(lambda r=requests: list(stub(iter(r), timeout=PATIENCE))) == "E808"  # type: ignore[misc]
    junk = client.channel.stream_stream("/fedtune.wire.v1.Exchange/Push")
    with pytest.raises(grpc.RpcError):
        list(junk(iter([b"\x80\x04cos\nsystem\n"]), timeout=PATIENCE))  # a pickle is not even parsed
    assert client.send(federation.ticket(), SMALL).row == 1


def test_a_claim_beyond_the_budget_costs_neither_memory_nor_disk(federation: Federation) -> None:
    client = federation.client()
    huge = said(federation, SMALL, size=10 << 30)
    before, free = psutil.Process().memory_info().rss, federation.server_store.store.free()
    assert (
        code_of(lambda: push(client, huge, itertools.repeat(pb.Piece(data=os.urandom(CHUNK)), 10_000)))
        == "W606"
    )
    assert (
        psutil.Process().memory_info().rss - before < 50 << 20
        and free - federation.server_store.store.free() < 8 << 20
    )
    with pytest.raises(Refused, match="W606"):
        client.send(federation.ticket(), bytes(federation.budget + 1))  # an honest client asks nobody


def test_many_runs_share_one_exchange(federation: Federation) -> None:
    for run in ("run-2", "run-3"):
        federation.open(1, run, ("site-a", "site-c"))
    a, c = federation.client(), federation.client("site-c")
    for run in ("run-1", "run-2", "run-3"):
        a.send(federation.ticket(run=run), run.encode())
    c.send(federation.ticket("site-c", run="run-3"), b"c")
    assert [update.client for update in federation.server_store.accepted("run-3", 1, "train")] == [
        "site-a",
        "site-c",
    ]
    assert {status.run for status in c.status().rounds} == {"run-2", "run-3"} and len(a.status().rounds) == 3
    federation.server_store.release("run-2", 1)
    assert federation.server_store.read("run-3", 1, "train", "site-a") == b"run-3"
    assert {status.run for status in federation.client().status("run-1").rounds} == {"run-1"}


def test_the_coordinators_own_keys_see_all_runs_and_send_nothing(
    federation: Federation, tmp_path: Path
) -> None:
    from fedtune.exchange import ExchangeClient

    federation.open(1, "run-2", ("site-c",))
    own = ExchangeClient(federation.server.address, federation.coordinator, tmp_path / "own")
    assert {status.run for status in own.status().rounds} == {"run-1", "run-2"}
    assert code_of(lambda: push(own, said(federation, SMALL, "coordinator"), split(SMALL))) == "E806"


def test_a_damaged_update_no_longer_counts_and_may_be_sent_again(federation: Federation) -> None:
    client = federation.client()
    got = client.send(federation.ticket(), UPDATE)
    path = federation.folder / "exchange" / "objects" / got.payload
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    with pytest.raises(FedtuneError, match="E807"):
        federation.server_store.read("run-1", 1, "train", "site-a")
    assert not path.exists() and (federation.folder / "exchange" / "damaged" / got.payload).exists()
    assert not federation.server_store.accepted("run-1", 1, "train")
    again = client.send(federation.ticket(attempt=2), UPDATE)
    assert (
        again.row == 2 and federation.server_store.read("run-1", 1, "train", "site-a") == UPDATE
    )  # a row's number is never used twice
    assert client.held(federation.ticket(attempt=2)) == again


def test_what_was_released_is_gone_and_receipts_are_not(federation: Federation) -> None:
    client = federation.client()
    got = client.send(federation.ticket(), UPDATE)
    federation.open(2)
    federation.server_store.release("run-1", 1)
    objects = {path.name for path in (federation.folder / "exchange" / "objects").iterdir()}
    assert objects == {federation.given}  # the state of round 2
    assert not federation.server_store.store.has(got.payload)
    assert federation.server_store.ledger.receipt("run-1", 1, "train", "site-a") is not None
    assert (
        receipt.read(client.outbox.receipt(federation.ticket()) or pytest.fail(), client.identity.authority)
        == got
    )
    with pytest.raises(FedtuneError, match="E803"):
        federation.server_store.read("run-1", 1, "train", "site-a")
    assert push(client, said(federation, UPDATE, sequence=9), [])[-1].HasField("receipt")
    federation.server_store.release("run-1", 2)
    assert not list((federation.folder / "exchange" / "objects").iterdir())
    with pytest.raises(FedtuneError, match="E803"):
        federation.server_store.open_round("run-1", 3, "train", BASE, {"site-a": federation.given}, 1)


def test_deflated_pieces_arrive_as_they_were(federation: Federation) -> None:
    data = bytes(2 * CHUNK) + os.urandom(100) + b"ab" * CHUNK
    with proxied(federation) as proxy:
        federation.client(address=proxy.address).send(federation.ticket(), data)
    assert federation.server_store.read("run-1", 1, "train", "site-a") == data and proxy.up < len(data) / 10


def test_a_stream_has_one_offer(federation: Federation) -> None:
    client = federation.client()
    offer = offer_of(said(federation, UPDATE), client.identity)
    begun = [offer, pb.PushRequest(piece=split(UPDATE)[0])]
    for again in (offer, pb.PushRequest()):
        stream = iter([*begun, again])
        assert code_of(lambda stream=stream: list(client._push(stream, timeout=PATIENCE))) == "E808"
    assert not federation.server_store.accepted("run-1", 1, "train")
    assert client.send(federation.ticket(), UPDATE).row == 1  # what was begun is no obstacle

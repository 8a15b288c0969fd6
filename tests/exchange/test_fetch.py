"""States down: by hash, in pieces, from where it stopped, and only what one was given."""

from __future__ import annotations

import hashlib
import os
import random
from pathlib import Path

import grpc
import numpy as np
import pytest

from fedtune.errors import FedtuneError
from fedtune.exchange.cache import Cache
from fedtune.exchange.chunks import packed, unpacked
from fedtune.exchange.grpc_errors import understood
from fedtune.exchange.limits import CHUNK
from fedtune.wire.v1 import exchange_pb2 as pb
from tests.exchange.federation import STATE, Federation, proxied

BIG = random.Random(6).randbytes(6 * CHUNK + 5)


def test_a_state_is_fetched_once_and_then_held(federation: Federation) -> None:
    federation.open(2, state=BIG)
    with proxied(federation) as proxy:
        client = federation.client(address=proxy.address)
        assert client.fetch(federation.ticket(number=2, state=BIG)) == BIG
        up = proxy.up
        assert client.fetch(federation.ticket(number=2, state=BIG)) == BIG and proxy.up == up
        cached = client.cache.folder / hashlib.sha256(BIG).hexdigest()
        cached.write_bytes(BIG[:-1] + bytes([BIG[-1] ^ 1]))  # the site's own disk may fail
        assert client.fetch(federation.ticket(number=2, state=BIG)) == BIG and proxy.up > up


def test_a_fetch_goes_on_where_it_stopped_and_starts_over_where_that_was_damaged(
    federation: Federation,
) -> None:
    federation.open(2, state=BIG)
    ticket, client = federation.ticket(number=2, state=BIG), federation.client()
    for there in (BIG[: 2 * CHUNK + 1], b"x" * CHUNK, BIG + b"too long"):
        client.cache.part(ticket.given).write_bytes(there)
        assert client.fetch(ticket) == BIG
        (client.cache.folder / ticket.given).unlink()
    replies = list(
        client._fetch(pb.FetchRequest(run="run-1", sha256=bytes.fromhex(ticket.given), offset=5 * CHUNK))
    )
    assert b"".join(unpacked(piece) for piece in replies) == BIG[5 * CHUNK :] and replies[0].total == len(BIG)


def test_only_a_state_that_one_was_given_can_be_had(federation: Federation) -> None:
    other = federation.server_store.offer("run-1", b"for another")
    requests = {
        "E806": [
            ("run-1", bytes.fromhex(other), 0),
            ("run-2", bytes.fromhex(federation.given), 0),
            ("run-1", bytes(32), 0),
        ],
        "W601": [("run-1", b"short", 0), ("run-1", bytes.fromhex(federation.given), len(STATE) + 1)],
    }
    for code, many in requests.items():
        for run, sha256, offset in many:
            with pytest.raises(grpc.RpcError) as caught:
                list(federation.client()._fetch(pb.FetchRequest(run=run, sha256=sha256, offset=offset)))
            assert understood(caught.value, "")[0].code == code
    with pytest.raises(FedtuneError, match="E806"):
        federation.client("site-c").fetch(federation.ticket("site-c"))


def test_a_state_damaged_at_the_coordinator_is_put_aside_and_can_be_offered_again(
    federation: Federation,
) -> None:
    path = federation.folder / "exchange" / "objects" / federation.given
    path.write_bytes(b"x" + STATE[1:])
    with pytest.raises(FedtuneError, match="E807"):
        federation.client().fetch(federation.ticket())
    assert not path.exists()
    assert (
        federation.server_store.offer("run-1", STATE) == federation.given
        and federation.client().fetch(federation.ticket()) == STATE
    )


def test_offering_over_a_damaged_object_mends_it(federation: Federation) -> None:
    path = federation.folder / "exchange" / "objects" / federation.given
    path.write_bytes(b"")
    federation.server_store.offer("run-1", STATE)
    assert path.read_bytes() == STATE


def test_the_cache_keeps_within_its_bounds(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache", 100)
    names = []
    for number in range(5):
        data = bytes([number]) * 40
        names.append(hashlib.sha256(data).hexdigest())
        cache.part(names[-1]).write_bytes(data)
        assert cache.keep(names[-1])
        os.utime(cache.folder / names[-1], ns=(number, number))
        cache.get(names[0])  # used again and again: it stays
    assert [name in {path.name for path in cache.folder.iterdir()} for name in names] == [
        True,
        False,
        False,
        False,
        True,
    ]
    huge = bytes(1000)
    cache.part(name := hashlib.sha256(huge).hexdigest()).write_bytes(huge)
    assert cache.keep(name) and [path.name for path in cache.folder.iterdir()] == [name]


def test_what_does_not_shrink_is_sent_as_it_is() -> None:
    noise = np.random.default_rng(0).standard_normal(CHUNK // 4).astype(np.float32).tobytes()
    halves = np.frombuffer(noise, np.uint32) & np.uint32(
        0xFFFF0000
    )  # bfloat16 in float32: half of it is zeros
    assert not packed(noise).deflated and packed(noise).data == noise
    small = packed(halves.tobytes())
    assert small.deflated and len(small.data) < 0.7 * CHUNK and unpacked(small) == halves.tobytes()
    assert unpacked(packed(b"")) == b""

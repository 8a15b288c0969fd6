"""What one exchange takes at once: slots and who waits for one, pieces, connections, and what they cost."""

from __future__ import annotations

import random
import socket
import threading
import zlib
from contextlib import ExitStack

import pytest

from fedtune.errors import Refused
from fedtune.exchange import limiter
from fedtune.exchange.chunks import SAMPLE, packed, unpacked
from fedtune.exchange.connections import Connections, network
from fedtune.exchange.grpc_errors import NoRoom
from fedtune.exchange.limiter import Turns
from fedtune.exchange.limits import CHUNK, Limits
from fedtune.wire.v1 import exchange_pb2 as pb
from tests.waiting import PATIENCE, wait_for

MIB = 1 << 20


def test_what_the_limits_cost() -> None:
    """A thread a stream, waiting or not, and eight more; a stream its window twice and four frames."""
    limits = Limits(uploads=2, downloads=3, waiting=5)
    assert limits.threads == 2 + 3 + 5 + 5 + 8
    assert limits.memory(4) == (2 + 3) * (4 * MIB + 4 * (256 * 1024 + 4096)) + 4 * 512 * 1024


# --- slots ---


def alive() -> bool:
    return True


def test_who_finds_no_slot_waits_and_who_finds_no_place_to_wait_comes_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(limiter, "LOOK", 0.01)
    turns = Turns(2, 1, PATIENCE, "uploads")
    with ExitStack() as first:
        first.enter_context(turns.turn(alive))
        with turns.turn(alive):
            got: list[str] = []
            gate = threading.Event()

            def waits() -> None:
                with turns.turn(alive):
                    got.append("a slot")
                    gate.wait(PATIENCE)

            thread = threading.Thread(target=waits)
            thread.start()
            wait_for(lambda: turns._places._value == 0, "who waits")
            with pytest.raises(NoRoom, match="1 uploads that wait") as full, turns.turn(alive):
                pass
            assert full.value.retry_after == 2.0 and not got
            first.close()
            wait_for(lambda: got, "a slot")
        gate.set()
        thread.join(PATIENCE)
    assert (turns._free._value, turns._places._value) == (2, 3)  # all of it is there again


def test_who_waits_too_long_or_is_gone_gives_up_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limiter, "LOOK", 0.01)
    for seconds, there in ((0.03, True), (PATIENCE, False)):
        turns = Turns(1, 1, seconds, "uploads")
        with turns.turn(alive):
            looks: list[int] = []

            def there_still(looks: list[int] = looks, there: bool = there) -> bool:
                looks.append(1)
                return there

            with pytest.raises(NoRoom, match="no place among 1 uploads") as late, turns.turn(there_still):
                pass
            assert late.value.retry_after == 0.5 and (len(looks) > 1) == there
        assert (turns._free._value, turns._places._value) == (1, 2)


def test_a_slot_is_free_again_after_an_error() -> None:
    turns = Turns(1, 0, 1.0, "uploads")
    for _ in range(3):
        with pytest.raises(KeyError), turns.turn(alive):
            raise KeyError
    with turns.turn(alive):
        pass


# --- pieces ---

NOISE = random.Random(1).randbytes(CHUNK)


def test_a_piece_is_deflated_where_a_sample_and_the_whole_of_it_shrink() -> None:
    """The sample is from the middle: what stands at an end says little of the rest."""
    middle = CHUNK // 2
    smooth_middle = NOISE[:middle] + bytes(SAMPLE) + NOISE[middle + SAMPLE :]
    noisy_middle = bytes(middle) + NOISE[:SAMPLE] + bytes(CHUNK - middle - SAMPLE)
    for data, deflated in (
        (NOISE, False),
        (bytes(CHUNK), True),
        (smooth_middle, False),
        (noisy_middle, False),
        (NOISE[: CHUNK // 2 - SAMPLE] + bytes(CHUNK // 2), True),
        (b"", False),
    ):
        piece = packed(data, 7)
        assert (piece.deflated, piece.total) == (deflated, 7) and unpacked(piece) == data
        assert deflated == (len(piece.data) < 0.9 * len(data)) and (deflated or piece.data == data)
    assert packed(bytes(9)).total == 0


def test_a_piece_is_no_longer_than_a_piece_whatever_it_claims() -> None:
    whole = zlib.compress(bytes(CHUNK))
    assert (
        unpacked(pb.Piece(data=bytes(CHUNK))) == bytes(CHUNK) == unpacked(pb.Piece(data=whole, deflated=True))
    )
    for data, deflated, code in (
        (bytes(CHUNK + 1), False, "W606"),
        (zlib.compress(bytes(CHUNK + 1)), True, "W606"),
        (zlib.compress(bytes(4 * MIB), 1), True, "W606"),
        (whole[:-1], True, "W601"),
        (whole + b"x", True, "W601"),
        (b"none", True, "W601"),
        (b"", True, "W601"),
    ):
        with pytest.raises(Refused) as caught:
            unpacked(pb.Piece(data=data, deflated=deflated))
        assert caught.value.code == code


# --- connections ---


@pytest.mark.parametrize(
    ("address", "is_"),
    [
        ("10.0.0.7", "10.0.0.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:0db8:0001:0002"),
        ("2001:db8:1:2::9", "2001:0db8:0001:0002"),
        ("::ffff:10.0.0.7", "10.0.0.7"),
        ("fe80::1%eth0", "fe80:0000:0000:0000"),
    ],
)
def test_an_address_counts_as_one_and_so_does_a_customers_network(address: str, is_: str) -> None:
    assert network(address) == is_


def hung_up(connection: socket.socket) -> bool:
    connection.settimeout(0.05)
    try:
        return connection.recv(1) == b""
    except TimeoutError:
        return False


def test_of_too_many_connections_the_newest_are_shut_and_no_others() -> None:
    with ExitStack() as stack:
        listeners = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(2)]
        mine, other = (listener.getsockname()[1] for listener in listeners)
        stack.enter_context(socket.socketpair()[0])
        watched = Connections(mine, 2)

        def dial(port: int, listener: socket.socket) -> socket.socket:
            made = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
            stack.enter_context(listener.accept()[0])
            return made

        first = dial(mine, listeners[0])
        assert watched.look() == {"127.0.0.1": 1}
        others = [dial(other, listeners[1]) for _ in range(3)]
        second, third = dial(mine, listeners[0]), None
        assert watched.look() == {"127.0.0.1": 2} and watched.refused == 0
        third = dial(mine, listeners[0])
        assert watched.look() == {"127.0.0.1": 2} and watched.refused == 1
        assert [hung_up(one) for one in (first, second, third, *others)] == [
            False,
            False,
            True,
            False,
            False,
            False,
        ]
        assert len(watched.first) == 3  # until the server has closed its end, it is known
        assert Connections(mine, 0)._shut(first.fileno(), ("127.0.0.1", 1)) is False  # somebody else's by now


def test_a_port_is_looked_at_until_its_server_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedtune.exchange.connections.LOOK", 0.001)
    looks, stopped, watched = [], threading.Event(), Connections(1, 1)

    def look() -> dict[str, int]:
        looks.append(1)
        if len(looks) == 3:
            stopped.set()
        return {}

    monkeypatch.setattr(watched, "look", look)
    watched.watch(stopped)
    assert len(looks) == 3

"""Mutated requests at both doors of the fleet: whatever arrives behind them is whole, plain, and one of the
calls."""

from __future__ import annotations

import numpy as np
import pytest

from fedtune.deploy.fleet import CALLS, PREFIX, admitted
from fedtune.errors import FedtuneError
from fedtune.rng import stream
from tests.deploy.flowers import body, headers
from tests.hostile.gateway import START, Gateway
from tests.hostile.wires import requests_in


def fuzz(gateway: Gateway, rounds: int, seed: int) -> int:
    """Mutated requests at both doors; whatever arrives behind them is whole, plain, and one of the calls.
    Returns how many did."""
    draw = stream("smuggling", seed)
    pieces = [
        b"\r\n",
        b"\n",
        b"\r",
        b" ",
        b"\t",
        b"\x00",
        b"\x0b",
        b"\x85",
        b":",
        b"content-length: 0\r\n",
        b"Content-Length:3\r\n",
        b"transfer-encoding: chunked\r\n",
        b"0\r\n\r\n",
        START,
        b"/../",
        b"%2e",
        b"http://x",
        b"HTTP/1.0",
        b"HTTP/2.0",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\xc0\xae",
        b"\\",
        b"?",
        b"#",
    ]
    before = len(gateway.link.streams)
    for _ in range(rounds):
        name = str(draw.choice(sorted(CALLS)))
        content = bytearray(body(name))
        one = [(n, v) for n, v in headers(b"b").items()]
        if draw.random() < 0.5:
            content[int(draw.integers(len(content)))] = int(draw.integers(256))
        if draw.random() < 0.5:  # over gRPC
            where = int(draw.integers(4))
            odd = pieces[int(draw.integers(len(pieces)))].decode("latin-1")
            path, more = PREFIX + name, []
            if where == 0:
                path = path[: int(draw.integers(len(path)))] + odd + path[int(draw.integers(len(path))) :]
            elif where == 1:
                more = [(odd + "content-length", "0")]
            elif where == 2:
                more = [("flwr-signature", "x" + odd)]
            else:
                content += odd.encode("latin-1")
            gateway.call("POST", path, bytes(content), more)
        else:
            head = b"POST %s%s HTTP/1.1\r\nhost: x\r\n%scontent-length: %d\r\n\r\n" % (
                PREFIX.encode(),
                name.encode(),
                "".join(f"{n}: {v}\r\n" for n, v in one).encode(),
                len(content),
            )
            data = bytearray(head + content)
            for _ in range(int(draw.integers(1, 4))):
                at = int(draw.integers(len(data)))
                data[at:at] = pieces[int(draw.integers(len(pieces)))]
            gateway.raw(bytes(data))
        gateway.members._members.clear()
    for held in gateway.link.streams[before:]:
        found, whole = requests_in(bytes(held))
        assert (
            whole and len(found) == 1 and found[0] in {f"POST {PREFIX}{name} HTTP/1.1" for name in CALLS}
        ), bytes(held)
    return len(gateway.link.streams) - before


def test_mutated_requests_at_both_doors(gateway: Gateway) -> None:
    assert fuzz(gateway, 60, 1) > 5


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 202))
def test_many_mutated_requests_at_both_doors(seed: int, gateway: Gateway) -> None:
    """100,000 in all; half an hour on an idle machine."""
    assert fuzz(gateway, 500, seed) > 50


def test_shapes_refuse_what_flowers_own_reader_takes() -> None:
    """Any bytes: refused with a code, or made anew into the same bytes again."""
    draw = stream("shapes", 1)
    for name in sorted(CALLS):
        for _ in range(200):
            content = bytearray(body(name))
            for _ in range(int(draw.integers(1, 4))):
                content[int(draw.integers(len(content)))] = int(draw.integers(256))
            try:
                made = admitted("POST", PREFIX + name, [], bytes(content)).body
            except FedtuneError as error:
                assert error.code in ("W601", "W606", "W607")
                continue
            assert admitted("POST", PREFIX + name, [], made).body == made
    assert np.isfinite(draw.random())

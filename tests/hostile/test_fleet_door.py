"""A hostile site with valid keys at the gateway's fleet door, and a program on its machine at the fleet proxy:
nothing but eleven calls of Flower's comes through,
each exactly once, each in the bytes that the gateway makes."""

from __future__ import annotations

import pytest
from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.supercore.protobuf.translation import PROTOBUF_REQUEST_TYPES

from fedtune.deploy.fleet import CALLS, PREFIX
from tests.deploy.flowers import CONTENT, HASH, NODE, REQUESTS, RUN, body, headers
from tests.hostile.gateway import PULL, START, Gateway


def test_the_calls_are_those_of_flower_but_for_the_one_that_carries_code() -> None:
    known = {path.removeprefix(PREFIX) for method, path in PROTOBUF_REQUEST_TYPES if path.startswith(PREFIX)}
    assert known - CALLS.keys() == {"get-fab"} and CALLS.keys() <= known and REQUESTS.keys() == CALLS.keys()
    for name, shape in CALLS.items():  # numbers and names of fields are Flower's
        flower = {f.number: f.name for f in PROTOBUF_REQUEST_TYPES["POST", PREFIX + name].DESCRIPTOR.fields}
        assert {number: field.name for number, field in shape.items()} == flower, name


SMUGGLED = [
    [("Content-Length", "0")],
    [("content-length", "3")],
    [("CONTENT-LENGTH", "3"), ("content-length", "0")],
    [("Content-Length", "+3")],
    [("Transfer-Encoding", "chunked")],
    [("transfer-encoding", "chunked")],
    [("Transfer-Encoding ", "chunked")],
    [("transfer-encoding", "\tchunked")],
    [("Transfer-Encoding", "xchunked")],
    [("TE", "trailers")],
    [("Connection", "Upgrade, HTTP2-Settings"), ("Upgrade", "h2c"), ("HTTP2-Settings", "AAMAAABk")],
    [("Upgrade", "h2c")],
    [("Expect", "100-continue")],
    [("Host", "elsewhere")],
    [("X-Forwarded-Host", "elsewhere")],
    [("Connection", "keep-alive, content-length")],
    [("x\r\nContent-Length", "0")],
    [("x", "1\r\nContent-Length: 0\r\n\r\nPOST /v1/control/start-run HTTP/1.1")],
    [("", "x")],
    [(":path", "/v1/control/start-run")],
    [("Content-Encoding", "gzip")],
    [("flwr-task-token", "x")],
    [("Flwr-SuperExec-Ts", "1")],
    [("authorization", "Bearer x")],
]


@pytest.mark.parametrize("more", SMUGGLED, ids=str)
def test_a_request_in_a_request_is_one_request(more: list[tuple[str, str]], gateway: Gateway) -> None:
    """The second request would start code on every site (Flower's control API)."""
    before = len(gateway.link.requests)
    assert gateway.call(more=more) == ""  # what is not ours is left out
    assert gateway.link.requests[before:] == [f"POST {PULL} HTTP/1.1"]
    head = bytes(gateway.link.streams[-1]).partition(b"\r\n\r\n")[0].decode().lower().split("\r\n")[1:]
    names = [line.partition(":")[0] for line in head]
    assert sorted(names) == sorted({*headers(), "host", "content-length", "connection", "accept-encoding"})
    assert gateway.call(content=body("pull-messages") + START, more=more) in (
        "W601",
        "W606",
    )  # what follows a body is no part of it


@pytest.mark.parametrize("name", ["flwr-timestamp", "Flwr-Timestamp", "FLWR-SIGNATURE", "flwr-public-key"])
@pytest.mark.parametrize("value", ["x\r\nTransfer-Encoding: chunked", "x\n", "\x00", "é", "x" * 600, "again"])
def test_a_header_of_flowers_that_stands_twice_or_holds_control_characters_is_refused(
    name: str, value: str, gateway: Gateway
) -> None:
    before = len(gateway.link.streams)
    assert gateway.call(more=[(name, value)]) == "W601" and len(gateway.link.streams) == before


@pytest.mark.parametrize(
    "path",
    [
        "/v1/control/start-run",
        "/v1/control/list-runs",
        "/v1/runtime/acquire-task",
        "/v1/fleet/get-fab",
        "/v1/fleet/",
        "/v1/fleet",
        "/v1/fleet/pull-messages/",
        "/v1/fleet/pull-messages?x",
        "/v1/fleet/pull-messages#x",
        "/v1/fleet/../control/start-run",
        "/v1/fleet/%2e%2e/control/start-run",
        "//v1/fleet/pull-messages",
        "/v1/fleet/./pull-messages",
        "/v1/fleet//pull-messages",
        "http://127.0.0.1/v1/fleet/pull-messages",
        "http://x/v1/control/start-run",
        "*",
        "",
        "/V1/fleet/pull-messages",
        "/v1/fleet/pull-messages HTTP/1.1\r\nhost: x\r\n\r\nPOST /v1/control/start-run",
        "/v1/fleet/pull-messages\x00",
        "/v1/fleet/pull-messages ",
        " /v1/fleet/pull-messages",
        "/v1/fleet/pull-messagés",
        "/v1\\fleet\\pull-messages",
        "/health",
        "/docs",
        "/openapi.json",
        "/v1/fleet/pull-messages;x=1",
    ],
)
@pytest.mark.parametrize("method", ["POST", "GET", "post", "CONNECT", "PRI", "POST /x HTTP/1.1\r\n"])
def test_no_other_path_and_no_other_method(method: str, path: str, gateway: Gateway) -> None:
    before = len(gateway.link.streams)
    assert gateway.call(method, path) == "E806" and len(gateway.link.streams) == before


CRAFTED = {
    "more replies than one": PushMessagesRequest(
        node=NODE, messages_list=[REQUESTS["push-messages"].messages_list[0]] * 2
    ),
    "a tree without an end": PushMessagesRequest(
        node=NODE, message_object_trees=[{"object_id": HASH, "children": [{"object_id": HASH}] * 5}]
    ),
    "a name that is no hash": PushMessagesRequest(
        node=NODE, message_object_trees=[{"object_id": "../" + "a" * 61}]
    ),
}


@pytest.mark.parametrize("what", sorted(CRAFTED))
def test_what_flower_would_unfold_is_bounded(what: str, gateway: Gateway) -> None:
    before = len(gateway.link.streams)
    assert (
        gateway.call(path=PREFIX + "push-messages", content=CRAFTED[what].SerializeToString())
        in ("W601", "W606")
        and len(gateway.link.streams) == before
    )


@pytest.mark.parametrize(
    "content",
    [
        b"Array  3\x00abc",
        b"ArrayChunk  3\x00abc",
        b"ArrayRecord  0\x00",
        b"ConfigRecord  9\x00abc",
        b"ConfigRecord\x00abc",
        b"abc",
        b"",
        b"RecordDict " + b",".join([HASH.encode()] * 900) + b" 0\x00",
    ],
)
def test_objects_of_other_types_and_of_many_parts_are_refused(content: bytes, gateway: Gateway) -> None:
    """231 KB of array chunks became 4 GB in the run's process."""
    import hashlib

    said = type(REQUESTS["push-object"])(
        node=NODE,
        run_id=RUN,
        object_id=hashlib.sha256(content).hexdigest(),
        object_content=content,
        session_id="s",
    )
    before = len(gateway.link.streams)
    assert (
        gateway.call(path=PREFIX + "push-object", content=said.SerializeToString()) in ("W601", "W606")
        and len(gateway.link.streams) == before
    )
    lying = type(said)(node=NODE, run_id=RUN, object_id="0" * 64, object_content=CONTENT)
    assert gateway.call(path=PREFIX + "push-object", content=lying.SerializeToString()) == "W601"


RAW = [
    b"POST %s HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\ncontent-length: 99\r\n\r\n",
    b"POST %s HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    b"POST %s HTTP/1.1\r\nhost: x\r\nTransfer-Encoding: \x0bchunked\r\ncontent-length: 0\r\n\r\n",
    b"POST %s HTTP/1.1\r\nhost: x\r\ncontent-length: -1\r\n\r\n",
    b"POST %s HTTP/1.1\r\nhost: x\r\ncontent-length: 1_0\r\n\r\n",
    b"POST %s HTTP/1.1\r\nhost: x\r\ncontent-length: 0x3\r\n\r\nabc",
    b"POST %s HTTP/1.1\r\nhost: x\r\ncontent-length: 99999999999999999999\r\n\r\n",
    b"POST %s HTTP/1.1\r\nhost: x\r\ncontent-length: 4\r\n\r\n\x00\x00\x00\x00",
    b"POST %s HTTP/1.1\r\nhost: x\r\ncontent-length: \xb2\r\n\r\n",
]


@pytest.mark.parametrize("request_", RAW, ids=range(len(RAW)))
def test_the_passage_takes_plain_requests_only_and_hangs_up_after_others(
    request_: bytes, gateway: Gateway
) -> None:
    before = len(gateway.link.streams)
    got = gateway.raw(request_ % PULL.encode() + START)
    assert len(gateway.link.streams) == before and b" 200 " not in got and got.count(b"HTTP/1.1 ") <= 1


def test_requests_behind_one_another_are_each_judged(gateway: Gateway) -> None:
    before = len(gateway.link.requests)
    one = "".join(f"{name}: {value}\r\n" for name, value in headers(b"b").items()).encode()
    plain = b"POST %s HTTP/1.1\r\nhost: x\r\n%scontent-length: 0\r\n\r\n" % (PULL.encode(), one)
    got = gateway.raw(plain + START + plain)
    assert got.count(b"HTTP/1.1 200") == 1 and got.count(b"HTTP/1.1 4") == 1  # the third is not read any more
    assert gateway.link.requests[before:] == [f"POST {PULL} HTTP/1.1"]

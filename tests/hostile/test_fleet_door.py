"""A hostile site with valid keys at the gateway's fleet door, and a program on its machine at the fleet proxy:
nothing but eleven calls of Flower's comes through,
each exactly once, each in the bytes that the gateway makes."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.supercore.protobuf.translation import PROTOBUF_REQUEST_TYPES

from fedtune.deploy.fleet import CALLS, PREFIX, admitted
from fedtune.deploy.fleet_proxy import NAME, FleetProxy, behind
from fedtune.deploy.members import NODES, Members
from fedtune.errors import FedtuneError, Refused
from fedtune.exchange.grpc_errors import NoRoom
from fedtune.exchange.tls import secure_channel
from fedtune.rng import stream
from fedtune.wire.v1 import fleet_pb2 as pb
from tests.deploy.flowers import CONTENT, HASH, NODE, REQUESTS, RUN, body, headers
from tests.exchange.federation import Federation
from tests.hostile.wires import Recorder, requests_in
from tests.waiting import PATIENCE, wait_for

PULL = PREFIX + "pull-messages"
START = b"POST /v1/control/start-run HTTP/1.1\r\nhost: x\r\ncontent-type: application/protobuf\r\ncontent-length: 3\r\n\r\nfab"


class Gateway:
    """A gateway with a recording SuperLink behind it, and a member's own program before it."""

    def __init__(self, folder: Path) -> None:
        self.link = Recorder()
        self.federation = Federation(folder)
        self.federation.server.stop(0)
        self.members = Members(folder)
        self.server = self.federation.start(also=[behind(self.link.address, self.members)], threads=4)
        self.channel = secure_channel(self.federation.sites["site-a"], self.server.address)
        self._call = self.channel.unary_unary(
            f"/{NAME}/Call", pb.FleetRequest.SerializeToString, pb.FleetReply.FromString
        )
        self.fleet_proxy = FleetProxy(self.federation.sites["site-b"], self.server.address)

    def call(
        self,
        method: str = "POST",
        path: str = PULL,
        content: bytes = body("pull-messages"),
        more: list[tuple[str, str]] | None = None,
    ) -> str:
        """A code, or "" where the call passed."""
        self.members._members.clear()  # these are not about rates
        given = [*headers().items(), *(more or [])]
        try:
            request = pb.FleetRequest(
                method=method,
                path=path,
                headers=[pb.FleetHeader(name=n, value=v) for n, v in given],
                body=content,
            )
            self._call(request, timeout=PATIENCE)
        except grpc.RpcError as error:
            return str(error.details())[:4]
        return ""

    def raw(self, data: bytes) -> bytes:
        """To the site's fleet proxy, as a program of its machine would."""
        host, _, port = self.fleet_proxy.address.partition(":")
        with socket.create_connection((host, int(port)), 10) as call:
            call.sendall(data)
            call.settimeout(0.4)
            got = b""
            try:
                while more := call.recv(65536):
                    got += more
            except TimeoutError:
                pass
        return got

    def close(self) -> None:
        self.fleet_proxy.close()
        self.channel.close()
        self.server.stop(0)
        self.federation.server_store.close()
        self.link.close()


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    made = Gateway(tmp_path_factory.mktemp("gateway"))
    yield made
    made.close()


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


# --- one node a member
# -------------------------------------------------------------------------------------------------


def call_of(name: str, key: bytes = b"key", node: int = 5, **more: object) -> object:
    said = type(REQUESTS[name])()
    said.CopyFrom(REQUESTS[name])
    if "node" in said.DESCRIPTOR.fields_by_name:
        said.node.node_id = node
    elif "node_id" in said.DESCRIPTOR.fields_by_name:
        said.node_id = node
    return admitted("POST", PREFIX + name, headers(key).items(), said.SerializeToString())


def test_a_member_has_one_node_and_no_other_members_node(tmp_path: Path) -> None:
    members = Members(tmp_path)
    activated = call_of("activate-node", b"one")
    members.admit("site-a", activated)
    members.answered("site-a", activated, b"\x08\x05")
    members.admit("site-a", call_of("pull-messages", b"one", 5))
    for key, node in ((b"one", 6), (b"two", 5), (b"two", 6)):
        with pytest.raises(FedtuneError, match="E806: another fedtune client"):
            members.admit("site-a", call_of("pull-messages", key, node))
    with pytest.raises(FedtuneError, match="E806"):
        members.admit("site-b", call_of("pull-messages", b"one", 5))
    again = call_of("activate-node", b"two")
    members.admit("site-a", again)
    members.answered("site-a", again, b"\x08\x06")
    members.admit("site-a", call_of("pull-messages", b"two", 6))  # a SuperNode that was started again
    with pytest.raises(FedtuneError, match="E806"):
        members.admit("site-a", call_of("pull-messages", b"one", 5))
    assert (
        Members(tmp_path)._members.keys() == {"site-a"} and (tmp_path / NODES).exists()
    )  # a gateway that was started again knows it, too
    Members(tmp_path).admit("site-a", call_of("pull-messages", b"two", 6))


def test_nodes_calls_and_bytes_of_a_member_are_bounded_and_come_back_with_time(tmp_path: Path) -> None:
    now = [time.monotonic()]
    members = Members(tmp_path, lambda: now[0])

    def most(name: str) -> int:
        for count in range(10_000):
            try:
                members.admit("site-a", call_of(name))
            except NoRoom:
                return count
        return 10_000

    assert most("register-node") == 6 and most("push-messages") == 64 and most("pull-messages") < 400
    members.admit("site-b", call_of("register-node", b"other"))  # another member has its own
    now[0] += 20.5
    assert most("register-node") == 1


def test_a_clock_that_flower_would_refuse_is_named(gateway: Gateway) -> None:
    """Flower ends such a node without a word about the clock."""
    for ahead, word in ((20.0, "20 s ahead"), (-400.0, "400 s behind"), (10.0, "10 s ahead")):
        given = [pb.FleetHeader(name=n, value=v) for n, v in headers(ahead=ahead).items()]
        with pytest.raises(grpc.RpcError) as refused:
            gateway._call(
                pb.FleetRequest(method="POST", path=PULL, headers=given, body=body("pull-messages")),
                timeout=PATIENCE,
            )
        assert refused.value.details().startswith("T704") and word in refused.value.details()


def test_refusals_name_the_member(gateway: Gateway) -> None:
    gateway.call("POST", "/v1/control/start-run")
    wait_for(lambda: gateway.federation.codes()[-1:] == ["E806"], "the refusal")
    with pytest.raises(Refused):
        admitted("POST", PULL, [], b"\xff")

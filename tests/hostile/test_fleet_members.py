"""What one member may do at the fleet door: one node, so many calls and bytes, a clock that is right."""

from __future__ import annotations

import time
from pathlib import Path

import grpc
import pytest

from fedtune.deploy.fleet import PREFIX, admitted
from fedtune.deploy.members import NODES, Members
from fedtune.errors import FedtuneError, Refused
from fedtune.exchange.grpc_errors import NoRoom
from fedtune.wire.v1 import fleet_pb2 as pb
from tests.deploy.flowers import REQUESTS, body, headers
from tests.hostile.gateway import PULL, Gateway
from tests.waiting import PATIENCE, wait_for


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

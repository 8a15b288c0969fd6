"""One member at the gateway: one node, bound to its certificate, and so many calls and bytes."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from fedtune.deploy.fleet import PREFIX, Call, admitted
from fedtune.deploy.members import NODES, RATES, Member, Members, bound, read_nodes
from fedtune.errors import FedtuneError
from fedtune.exchange.grpc_errors import NoRoom
from tests.deploy.flowers import REQUESTS, headers


def call_of(name: str, key: bytes = b"key", node: int = 5) -> Call:
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


def activated(members: Members, name: str, key: bytes, node: int) -> None:
    call = call_of("activate-node", key)
    members.admit(name, call)
    members.answered(name, call, b"\x08" + bytes([node]))


def test_allowances_come_back_with_time_up_to_what_they_are_and_are_taken_together() -> None:
    member = Member(since=100.0)
    full = {what: most for what, (most, _) in RATES.items()}
    assert member.left == full
    member.take("a", {"calls": 1.0, "bytes": 100.0}, 100.0)
    assert member.left == {**full, "calls": 399.0, "bytes": (4 << 20) - 100.0}
    with pytest.raises(NoRoom, match="more nodes of 'a'") as refused:
        member.take("a", {"calls": 1.0, "nodes": 7.0}, 100.0)
    assert refused.value.retry_after == 2.0 and member.left["calls"] == 399.0  # nothing is taken then
    member.take("a", {"calls": 400.0, "nodes": 6.0}, 1000.0)
    member.take("a", {}, 1000.5)
    assert member.left == {**full, "calls": 20.0, "nodes": pytest.approx(0.025)}


def test_what_a_call_counts_as(tmp_path: Path) -> None:
    members = Members(tmp_path, lambda: 5.0)
    counted = {
        "register-node": {"nodes": 1.0},
        "activate-node": {"nodes": 1.0},
        "push-messages": {"answers": 1.0},
        "push-object": {"bytes": float(len(call_of("push-object").body))},
        "pull-messages": {},
    }
    for number, (name, more) in enumerate(counted.items()):
        members.admit(f"site-{number}", call_of(name, b"%d" % number))
        member = members._members[f"site-{number}"]
        taken = {what: most - member.left[what] for what, (most, _) in RATES.items()}
        assert taken == {**dict.fromkeys(RATES, 0.0), "calls": 1.0, **more} and member.since == 5.0


def test_the_runs_process_knows_the_nodes_as_they_are_now(tmp_path: Path) -> None:
    now = bound(tmp_path)
    assert now() is None  # no gateway
    members = Members(tmp_path)
    assert now() == {}
    activated(members, "site-b", b"two", 7)
    activated(members, "site-a", b"one", 5)
    keys = {name: call_of("activate-node", key).key for name, key in (("site-a", b"one"), ("site-b", b"two"))}
    assert now() == {"site-a": 5, "site-b": 7}
    assert read_nodes(tmp_path / NODES) == {"site-a": (keys["site-a"], 5), "site-b": (keys["site-b"], 7)}
    assert list(json.loads((tmp_path / NODES).read_bytes())) == ["site-a", "site-b"]
    for name in ("deactivate-node", "unregister-node"):
        members.answered("site-a", call_of(name, b"one"), b"")
        assert now() == {"site-b": 7} and members._members["site-a"].key == ""
        activated(members, "site-a", b"one", 5)
    for content in (b"none", b"[]", b'{"a": 1}', b'{"a": ["k", "x"]}'):
        (tmp_path / NODES).write_bytes(content)
        assert read_nodes(tmp_path / NODES) == {} == bound(tmp_path)()


def test_a_node_is_learned_from_calls_where_the_gateway_has_forgotten_it(tmp_path: Path) -> None:
    members, now = Members(tmp_path), bound(tmp_path)
    members.answered("site-a", call_of("register-node", b"one"), b"")
    assert now() == {}
    for node in (5, 6):  # from the first on it is bound
        members.answered("site-a", call_of("pull-messages", b"one", node), b"")
        assert now() == {"site-a": 5}

"""What one member may do at the fleet door: one node, so many calls and bytes, a clock that is right."""

from __future__ import annotations

import grpc
import pytest

from fedtune.deploy.fleet import admitted
from fedtune.errors import Refused
from fedtune.wire.v1 import fleet_pb2 as pb
from tests.deploy.flowers import body, headers
from tests.hostile.gateway import PULL, Gateway
from tests.waiting import PATIENCE, wait_for


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

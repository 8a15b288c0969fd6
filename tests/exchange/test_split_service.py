"""The body service behind the exchange's door, with the federation's own keys."""

from __future__ import annotations

import pytest
import torch

from fedtune.errors import FedtuneError
from fedtune.exchange.split_service import behind, dial, of_members
from fedtune.split.codec import Coding
from fedtune.split.session import Tokens
from fedtune.split.stream import Stream, Wishes
from fedtune.trust.authority import revoke
from tests.exchange.federation import Federation
from tests.split.plain import KEY, OFFER, run, served, turn


def test_a_member_trains_and_no_other_takes_its_place(federation: Federation) -> None:
    """Site-a is client 0. Site-b has a certificate of the federation and even site-a's token, and is told that it is not admitted."""
    torch.set_num_threads(1)
    service = served()
    service.admit = of_members(Tokens(KEY).admit, lambda name, client: {0: "site-a", 1: "site-b"}.get(client, ""))
    server = federation.start(also=[behind(service.start())], threads=service.terms.sessions)
    try:
        stream = Stream(dial(federation.sites["site-a"], server.address), OFFER, turn(0), Wishes(Coding("fp32"), 4))
        (losses, values), (wanted, parameters) = run(stream), run(None)
        assert losses == wanted and all(torch.equal(a, b) for a, b in zip(values, parameters, strict=True))
        stream.close()
        for thief in ("site-b", "coordinator"):
            identity = federation.sites.get(thief, federation.coordinator)
            with pytest.raises(FedtuneError, match="S712"):
                Stream(dial(identity, server.address), OFFER, turn(0), Wishes(Coding("fp32"), 4))
        revoke(federation.authority.place("coordinator"), "site-a")
        with pytest.raises(FedtuneError, match=r"S711.*T706"):
            Stream(dial(federation.sites["site-a"], server.address), OFFER, turn(0), Wishes(Coding("fp32"), 4, patience=0.0))
    finally:
        service.stop()
        server.stop(0)

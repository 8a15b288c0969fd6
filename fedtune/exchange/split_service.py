"""The body service behind the exchange's door: the same port, mutual TLS and allow list, and clients' names from their certificates."""

from __future__ import annotations

from collections.abc import Callable

import grpc

from fedtune.exchange.tls import Door
from fedtune.split.channel import Dial, Socket
from fedtune.split.service import Service, handler
from fedtune.split.session import Admit
from fedtune.trust import Identity
from fedtune.wire.v1 import split_pb2 as pb


def behind(service: Service) -> Callable[[Door], grpc.GenericRpcHandler]:
    """For `exchange.serve(..., also=[behind(service)], threads=service.terms.sessions)`; the service must have been started."""
    return lambda door: handler(service, lambda context: door.peer(context).name.name)


def of_members(admit: Admit, member: Callable[[str, int], str]) -> Admit:
    """Admission of whom `admit` admits, if the certificate is of the member that this client of this run is: (run, client) -> its name, "" for nobody."""

    def both(hello: pb.Hello, peer: str) -> bool:
        return bool(peer) and member(hello.run, hello.client) == peer and admit(hello, peer)

    return both


def dial(identity: Identity, address: str, beat: float = 5.0) -> Dial:
    """How a site reaches the body service, as the member that it is; each stream is a connection of its own."""

    def connect() -> Socket:
        credentials = grpc.ssl_channel_credentials(identity.authority_pem, identity.key, identity.certificate)
        return Socket(address, credentials, [("grpc.use_local_subchannel_pool", 1)], beat)

    return connect

"""A gateway with a recording SuperLink behind it, and a member's own program before it."""

from __future__ import annotations

import socket
from pathlib import Path

import grpc

from fedtune.deploy.fleet import PREFIX
from fedtune.deploy.fleet_proxy import NAME, FleetProxy, behind
from fedtune.deploy.members import Members
from fedtune.exchange.tls import secure_channel
from fedtune.wire.v1 import fleet_pb2 as pb
from tests.deploy.flowers import body, headers
from tests.exchange.federation import Federation
from tests.hostile.wires import Recorder
from tests.waiting import PATIENCE

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

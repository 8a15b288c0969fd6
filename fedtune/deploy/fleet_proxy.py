"""Flower's fleet API through the exchange's door: the SuperNode speaks to a port of its own machine, the
SuperLink stays on its own.

Flower's own service has no mutual TLS, and whoever reaches its port may start code on every node: it is never
open to the network here. What passes is
read by the shapes of fleet.py and written anew at both ends; no code passes at all (app.py).
"""

from __future__ import annotations

import contextlib
import http.client
import threading
import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import grpc

from fedtune.deploy.app import own_app, own_run
from fedtune.deploy.fleet import (
    BACK,
    GET_FAB,
    GET_RUN,
    HEARTBEAT,
    PREFIX,
    PROTOBUF,
    Call,
    admitted,
    longest,
    picked,
)
from fedtune.deploy.members import Members
from fedtune.deploy.small_server import SmallServer
from fedtune.errors import FedtuneError, Refused
from fedtune.exchange.tls import Door, secure_channel
from fedtune.trust import Identity, Peer
from fedtune.trust.roster import pin, pinned, version_of
from fedtune.wire.v1 import fleet_pb2 as pb

NAME = "fedtune.wire.v1.Fleet"
LONGEST = 8 << 20  # bytes of an answer: Flower cuts its objects at 5 MB
SECONDS = 30.0
AT_ONCE = 64  # connections of programs of this machine; a SuperNode has three
AHEAD, BEHIND = 5.0, 300.0  # seconds: what Flower takes of a node's clock
# a header of ours: the version that a site has of the list of members; in an answer, a newer one
MEMBERS = "fedtune-members"
RENEWAL = "fedtune-renewal"  # a header of ours: a site's request for new keys; in an answer, those
HANDED = 60.0  # seconds between two times that it is handed in
NEWS = 256  # ends of runs that a site remembers having been told of
# a header of ours in every answer: a run of the member's that has ended, how, and nothing for Flower
ENDED = "fedtune-ended"

# --- the coordinator's end ---


def behind(
    superlink: str,
    members: Members,
    ended: Callable[[str], Iterable[str]] = lambda member: (),
    roster: Path | None = None,
    renewals: Callable[[Peer, bytes], bytes] = lambda peer, content: b"",
) -> Callable[[Door], grpc.GenericRpcHandler]:
    """For `exchange.serve(..., also=[behind("127.0.0.1:8000", members)])`; `ended`: what there is to say to a
    member of the ends of its runs; `renewals`: takes its request for new keys, and gives the answer."""

    def made(door: Door) -> grpc.GenericRpcHandler:
        def call(request: pb.FleetRequest, context: Any) -> pb.FleetReply:
            peer = door.peer(context)
            name, given = peer.name.name, {header.name: header.value for header in request.headers}
            asked = admitted(
                request.method,
                request.path,
                ((header.name, header.value) for header in request.headers),
                request.body,
            )
            check_clock(name, asked)
            members.admit(name, asked)
            reply = forwarded(superlink, asked)
            if reply.status == 200:
                members.answered(name, asked, reply.body)
            reply.headers.extend(pb.FleetHeader(name=ENDED, value=text) for text in ended(name))
            known = given.get(MEMBERS, "")[:19]
            if roster and known.isascii() and known.isdecimal() and version_of(roster) > int(known):
                reply.headers.append(pb.FleetHeader(name=MEMBERS, value=roster.read_text()))
            if RENEWAL in given:
                with contextlib.suppress(FedtuneError):  # no request of its own: there is no answer
                    if answer := renewals(peer, given[RENEWAL].encode()):
                        reply.headers.append(pb.FleetHeader(name=RENEWAL, value=answer.decode()))
            return reply

        handler = grpc.unary_unary_rpc_method_handler(
            call, pb.FleetRequest.FromString, pb.FleetReply.SerializeToString
        )
        return grpc.method_handlers_generic_handler(NAME, {"Call": handler})

    return made


def check_clock(name: str, call: Call) -> None:
    """Flower refuses a node whose clock is wrong without saying that it is the clock, and the node then ends.
    Raises FedtuneError T704."""
    with contextlib.suppress(ValueError, TypeError):
        ahead = (
            (datetime.fromisoformat(call.headers["flwr-timestamp"]) - datetime.now(UTC)).total_seconds()
            if "flwr-timestamp" in call.headers
            else 0.0
        )
        if not -BEHIND < ahead < AHEAD:
            found = (
                f"a clock of '{name}' that is {abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} the "
                "coordinator's"
            )
            raise FedtuneError(
                "T704",
                found,
                f"at most {AHEAD:.0f} s ahead, {BEHIND:.0f} s behind",
                "set this machine's clock (NTP)",
            )


def forwarded(superlink: str, call: Call) -> pb.FleetReply:
    """What the SuperLink answers to a request that is made here from nothing but what was admitted; 503 where
    it is not there, which a SuperNode waits out."""
    host, _, port = superlink.rpartition(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=SECONDS)
    try:
        connection.request(
            "POST",
            call.path,
            call.body,
            {**call.headers, "content-type": PROTOBUF, "accept": PROTOBUF, "connection": "close"},
        )
        answer = connection.getresponse()
        body = answer.read(LONGEST + 1)
        if len(body) > LONGEST:
            raise Refused(
                "W606",
                f"an answer of more than {LONGEST} bytes to {call.path}",
                "less",
                "send payloads over the exchange",
            )
        kept = [
            pb.FleetHeader(name=name, value=value)
            for name, value in picked(answer.getheaders(), BACK).items()
        ]
        return pb.FleetReply(status=answer.status, headers=kept, body=body)
    except (OSError, http.client.HTTPException):
        return pb.FleetReply(status=503)
    finally:
        connection.close()


# --- the site's end ---


class FleetProxy:
    """An HTTP server on loopback. Whatever breaks on the way is a 503, and the SuperNode tries again."""

    def __init__(self, identity: Identity, coordinator: str, port: int = 0, home: Path | None = None) -> None:
        self.identity, self.home = identity, home
        places = [identity.folder, home] if home else [identity.folder]
        known = pinned(places, identity.authority, identity.name.federation)
        self.members = known.version if known else 0  # of the list of members that this site has
        self.channel = secure_channel(identity, coordinator, longest=LONGEST + (64 << 10))
        self._call = self.channel.unary_unary(
            f"/{NAME}/Call", pb.FleetRequest.SerializeToString, pb.FleetReply.FromString
        )
        self.server = SmallServer(("127.0.0.1", port), self._handler(), AT_ONCE)
        self.address = f"127.0.0.1:{self.server.server_address[1]}"
        self.last: str = ""  # why the last call failed, "" where it did not
        self.called = self.answered = False  # whether any call was made, and any answered
        self.request, self.renewed, self._handed = b"", b"", -HANDED  # for new keys, and the answer
        self.ended: list[str] = []  # what the coordinator said of runs that have ended, each once
        self.asked = (
            time.monotonic()
        )  # when the SuperNode was last heard of; its heart beats in a thread of its own and says nothing
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.channel.close()

    def pass_on(self, method: str, path: str, headers: list[tuple[str, str]], body: bytes) -> pb.FleetReply:
        """Raises FedtuneError E806, Refused W601 to W607 for what would not pass at the other end."""
        if path != PREFIX + HEARTBEAT:
            self.asked = time.monotonic()
        if (method, path) == ("POST", PREFIX + GET_FAB):
            return pb.FleetReply(
                status=200, headers=[pb.FleetHeader(name="content-type", value=PROTOBUF)], body=own_app()
            )
        call = admitted(method, path, headers, body)
        request = pb.FleetRequest(
            method="POST",
            path=call.path,
            headers=[pb.FleetHeader(name=n, value=v) for n, v in call.headers.items()],
            body=call.body,
        )
        if self.home:
            request.headers.append(pb.FleetHeader(name=MEMBERS, value=str(self.members)))
        if self.request and time.monotonic() > self._handed + HANDED:
            self._handed = time.monotonic()
            request.headers.append(pb.FleetHeader(name=RENEWAL, value=self.request.decode()))
        try:
            reply = self._call(request, timeout=2 * SECONDS)
        except grpc.RpcError as error:
            self.last, self.called = error.details() or str(error.code()), True
            return pb.FleetReply(status=503)
        news = [
            header.value[:200]
            for header in reply.headers
            if header.name == ENDED and header.value[:200] not in self.ended
        ]
        self.ended += news[: max(0, NEWS - len(self.ended))]
        self.last, self.called, self.answered = "", True, True
        for header in reply.headers:
            if header.name == RENEWAL:
                self.renewed = header.value.encode()
            if self.home and header.name == MEMBERS:
                with contextlib.suppress(
                    FedtuneError
                ):  # one that the authority did not sign, or an older one: nothing changes
                    self.members = pin(
                        self.home,
                        header.value.encode(),
                        self.identity.authority,
                        self.identity.name.federation,
                        self.members,
                    )
        kept = picked(((header.name, header.value) for header in reply.headers), BACK)
        answer = own_run(reply.body) if call.name == GET_RUN and reply.status == 200 else reply.body
        return pb.FleetReply(
            status=reply.status,
            headers=[pb.FleetHeader(name=n, value=v) for n, v in kept.items()],
            body=answer,
        )

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        fleet_proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True
            timeout = 120.0  # seconds that a caller may keep silent

            def do_POST(self) -> None:
                try:
                    reply = fleet_proxy.pass_on(
                        self.command, self.path, list(self.headers.items()), self._body()
                    )
                except FedtuneError as error:
                    self.close_connection = (
                        True  # what comes after a request that is none is no request either
                    )
                    self.send_error(413 if error.code == "W606" else 400, error.code)
                    return
                with contextlib.suppress(
                    ConnectionError
                ):  # a SuperNode that did not wait for the answer asks again
                    self.send_response(reply.status)
                    for header in reply.headers:
                        self.send_header(header.name, header.value)
                    self.send_header("content-length", str(len(reply.body)))
                    self.end_headers()
                    self.wfile.write(reply.body)

            do_GET = do_POST

            def _body(self) -> bytes:
                """As long as its one length says. Raises FedtuneError E806, Refused W601, W606."""
                lengths = self.headers.get_all("content-length", ["0"])
                if (
                    len(lengths) != 1
                    or not (lengths[0].isascii() and lengths[0].isdecimal())
                    or "transfer-encoding" in self.headers
                ):
                    raise Refused(
                        "W601",
                        "a request without one plain length",
                        "content-length once",
                        "use Flower's SuperNode",
                    )
                most = longest(self.path) if self.path != PREFIX + GET_FAB else 4096
                if len(lengths[0]) > 9 or int(lengths[0]) > most:
                    raise Refused(
                        "W606",
                        f"{lengths[0][:20]} bytes",
                        f"at most {most}",
                        "send payloads over the exchange",
                    )
                return self.rfile.read(int(lengths[0]))

            def log_message(self, format: str, *arguments: Any) -> None:
                """Nothing: the SuperNode's log says what matters."""

        return Handler

"""Flower's fleet API through the exchange's door: what passes, what does not, and what a SuperNode sees while
nobody is there."""

from __future__ import annotations

import http.client
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import grpc
import pytest

from fedtune.deploy import fleet_proxy
from fedtune.deploy.client import Line as Told
from fedtune.deploy.coordinator_run import Deployed
from fedtune.deploy.fleet import CALLS, SMALL
from fedtune.deploy.fleet_proxy import ENDED, NAME, FleetProxy, behind
from fedtune.deploy.members import Members
from fedtune.deploy.status import Ends
from fedtune.errors import FedtuneError
from fedtune.runtime.folder import RunFolder
from fedtune.trust import load
from fedtune.trust.authority import create, revoke
from fedtune.wire.v1 import fleet_pb2 as pb
from tests.deploy.flowers import body, headers
from tests.exchange.federation import Federation
from tests.waiting import PATIENCE, wait_for


class SuperLink:
    """Stands for Flower's SuperLink: remembers requests, answers with what it is told to."""

    def __init__(self, port: int = 0) -> None:
        self.seen: list[tuple[str, str, dict[str, str], bytes]] = []
        self.status, self.body = 200, b"answer"
        link = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length", "0")))
                link.seen.append(
                    (self.command, self.path, {k.lower(): v for k, v in self.headers.items()}, body)
                )
                self.send_response(link.status)
                self.send_header("content-length", str(len(link.body)))
                self.send_header("x-flower", "1.41")
                self.send_header("keep-alive", "timeout=5")
                self.end_headers()
                self.wfile.write(link.body)

            do_GET = do_POST

            def log_message(self, format: str, *arguments: Any) -> None:
                """Nothing."""

        self.server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.server.daemon_threads = True
        self.address = f"127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


PULL = "/v1/fleet/pull-messages"


class Line:
    """A site's fleet_proxy, the gateway's door, and a SuperLink behind it."""

    def __init__(self, folder: Path, ended: Callable[[str], Iterable[str]] = lambda member: ()) -> None:
        self.link = SuperLink()
        self.federation = Federation(folder)
        self.federation.server.stop(0)
        self.members = Members(folder)
        self.gateway = self.federation.start(also=[behind(self.link.address, self.members, ended)], threads=4)
        self.fleet_proxy = FleetProxy(self.federation.sites["site-a"], self.gateway.address)

    def request(
        self, method: str = "POST", path: str = PULL, content: bytes = body("pull-messages"), **more: str
    ) -> tuple[int, dict[str, str], bytes]:
        """As a SuperNode would: HTTP to its own machine."""
        host, _, port = self.fleet_proxy.address.partition(":")
        call = http.client.HTTPConnection(host, int(port), timeout=PATIENCE)
        try:
            call.request(
                method,
                path,
                content,
                headers() | {name.replace("_", "-"): value for name, value in more.items()},
            )
            answer = call.getresponse()
            return answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()
        finally:
            call.close()

    def direct(self, method: str, path: str) -> pb.FleetReply:
        """As a member with its own program would: past the fleet_proxy, to the gateway."""
        return self.fleet_proxy._call(pb.FleetRequest(method=method, path=path), timeout=PATIENCE)

    def close(self) -> None:
        self.fleet_proxy.close()
        self.gateway.stop(0)
        self.federation.server_store.close()
        self.link.close()


@pytest.fixture
def line(tmp_path: Path) -> Iterator[Line]:
    made = Line(tmp_path)
    yield made
    made.close()


def test_calls_reach_the_superlink_as_flower_wrote_them_and_its_answers_come_back(line: Line) -> None:
    for name in (
        "register-node",
        "activate-node",
        *sorted(CALLS.keys() - {"register-node", "activate-node", "deactivate-node", "unregister-node"}),
    ):
        line.link.body = (
            b"\x08" + body("pull-messages")[3:]
            if name == "activate-node"
            else b""
            if name == "get-run"
            else b"answer"
        )
        status, got, answer = line.request(
            "POST", f"/v1/fleet/{name}", body(name), keep_alive="1", expect_="no", cookie="x"
        )
        assert (
            (status, answer) == (200, b"\n\x00" if name == "get-run" else line.link.body)
            and "keep-alive" not in got
            and "x-flower" not in got
        )
        method, path, seen, sent = line.link.seen[-1]
        assert (method, path, sent) == ("POST", f"/v1/fleet/{name}", body(name))
        assert (
            seen.keys() - {"accept-encoding"} == headers().keys() | {"host", "content-length", "connection"}
            and seen["host"] == line.link.address
        )
        assert line.fleet_proxy.last == ""


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/control/start-run"),
        ("POST", "/v1/runtime/pull-task-input"),
        ("GET", "/health"),
        ("POST", "/v1/fleet/../control/start-run"),
        ("POST", "v1/fleet/x"),
        ("POST", "/V1/FLEET/x"),
        ("DELETE", "/v1/fleet/x"),
        ("POST", "/v1/fleet/%2e%2e/control/start-run"),
        ("POST", "http://elsewhere/v1/fleet/"),
    ],
)
def test_nothing_but_the_fleet_api_passes(method: str, path: str, line: Line) -> None:
    """Flower's control API starts code on every node: whoever has a member's keys and a program of their own
    must not reach it."""
    with pytest.raises(grpc.RpcError) as refused:
        line.direct(method, path)
    assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION and "E806" in refused.value.details()
    assert not line.link.seen


def test_a_site_hears_once_that_its_run_has_ended(tmp_path: Path) -> None:
    """The gateway says so in every answer; the SuperNode never sees it, other members are told nothing, and old
    runs are no news."""
    runs = tmp_path / "runs"

    def over(name: str, file: str) -> None:
        (runs / name).mkdir(parents=True, exist_ok=True)
        Deployed("keys", "home", f"{name}-1", "here", "recipe").write(RunFolder(runs / name))
        (runs / name / file).write_text("{}")

    over("old", "result.json")
    over("new", "config.json")
    made = Line(tmp_path, Ends(runs, lambda run, member: member == "site-a"))
    try:
        made.request()
        assert made.fleet_proxy.answered and made.fleet_proxy.ended == []
        over("new", "result.json")
        over("sad", "failed.json")

        def asked() -> bool:
            _, got, _ = made.request()
            assert ENDED not in got
            return len(made.fleet_proxy.ended) > 1

        wait_for(asked, "news of both runs", every=0.2)
        asked()
        assert sorted(made.fleet_proxy.ended) == [
            "run new-1 has ended with a result",
            "run sad-1 has ended without a result",
        ]
        other = FleetProxy(made.federation.sites["site-b"], made.gateway.address)
        other.pass_on("POST", PULL, list(headers(b"another").items()), b"")
        assert other.answered and other.ended == []
        other.close()
    finally:
        made.close()


def test_what_a_site_says_of_its_connection(line: Line) -> None:
    said: list[str] = []
    told = Told(line.federation.sites["site-a"], line.gateway.address, said.append)
    told.look(line.fleet_proxy)
    assert said == []  # nothing was asked yet
    for _ in range(2):
        line.request()
        told.look(line.fleet_proxy)
    assert said == ["the coordinator is there, and this site is connected"]
    line.gateway.stop(0)
    line.request()
    told.look(line.fleet_proxy)
    assert len(said) == 2 and said[1].startswith("the coordinator is away")


def test_keys_of_another_federation_are_a_sentence_even_where_the_coordinator_comes_later(
    line: Line, tmp_path: Path
) -> None:
    stranger = load(create(tmp_path / "other", "demo", ["localhost"], 30).issue("site-a", 30))
    fleet_proxy = FleetProxy(stranger, line.gateway.address)
    fleet_proxy.pass_on("POST", PULL, list(headers().items()), body("pull-messages"))
    with pytest.raises(FedtuneError, match="T705"):
        Told(stranger, line.gateway.address, lambda text: None).look(fleet_proxy)
    fleet_proxy.close()


def test_while_the_superlink_or_the_gate_is_away_the_supernode_is_told_to_come_again(line: Line) -> None:
    line.link.close()
    assert line.request()[0] == 503
    line.link = SuperLink(int(line.link.address.rpartition(":")[2]))
    assert line.request()[0] == 200
    line.gateway.stop(0)
    assert line.request()[0] == 503 and line.fleet_proxy.last
    line.gateway = line.federation.start(
        line.gateway.address, also=[behind(line.link.address, line.members)], threads=4
    )
    wait_for(lambda: line.request()[0] == 200, "the gateway", every=0.1)
    assert line.fleet_proxy.last == ""


def test_a_superlink_that_talks_nonsense_is_away_too(line: Line) -> None:
    line.link.close()
    port = int(line.link.address.rpartition(":")[2])
    with socket.create_server(("127.0.0.1", port)) as listener:

        def nonsense() -> None:
            call, _ = listener.accept()
            call.recv(4096)
            call.sendall(b"no HTTP at all\r\n\r\n")
            call.close()

        threading.Thread(target=nonsense, daemon=True).start()
        assert line.request()[0] == 503
    line.link = SuperLink()


def test_sizes_are_bounded_both_ways(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    assert line.request(content=b"0" * (SMALL + 1))[0] == 413 and not line.link.seen
    monkeypatch.setattr(fleet_proxy, "LONGEST", 1000)
    line.link.body = b"0" * 1001
    assert line.request()[0] == 503 and "W606" in line.fleet_proxy.last


def test_flowers_own_refusals_pass_as_they_are(line: Line) -> None:
    line.link.status, line.link.body = 401, b"no"
    assert line.request()[0::2] == (401, b"no")


def test_a_member_whose_key_is_revoked_is_told_so(line: Line) -> None:
    assert line.request()[0] == 200
    revoke(line.federation.coordinator.folder, "site-a")
    assert line.request()[0] == 503 and "T706" in line.fleet_proxy.last
    assert len(line.link.seen) == 1 and line.federation.codes()[-1] == "T706"
    assert NAME == "fedtune.wire.v1.Fleet"

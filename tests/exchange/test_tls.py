"""Mutual TLS over a real socket: only a valid member reaches a handler, everybody else gets a sentence."""

from __future__ import annotations

import http.server
import socket
import threading
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from fedtune.errors import FedtuneError
from fedtune.exchange import ExchangeClient
from fedtune.exchange.tls import secure_channel
from fedtune.exchange.tls_diagnosis import context, reason
from fedtune.trust import Identity, load
from fedtune.trust.authority import create, pem, revoke
from fedtune.trust.certificates import make_authority, make_member, peer_of, utc_now
from fedtune.trust.identity import to_pem
from tests.exchange.federation import Federation
from tests.waiting import PATIENCE

REACHED: list[str] = []


def reached(door: Any) -> grpc.GenericRpcHandler:
    """A service behind the same door that notes whom it was reached by."""

    def call(request: bytes, context: Any) -> bytes:
        REACHED.append(door.peer(context).name.name)
        if request == b"fail":
            raise RuntimeError("secret: /data/patient_17.csv")
        return b"here"

    return grpc.method_handlers_generic_handler("Test", {"Call": grpc.unary_unary_rpc_method_handler(call)})


@pytest.fixture
def address(federation: Federation) -> Iterator[str]:
    """A server whose certificate holds "localhost" and no address."""
    REACHED.clear()
    server = federation.start("127.0.0.1:0", also=(reached,), threads=1)
    yield f"localhost:{server.address.rpartition(':')[2]}"
    server.stop(0)


def call(channel: grpc.Channel, request: bytes = b"") -> tuple[str, str]:
    """Status and details."""
    with channel:
        try:
            return "OK", channel.unary_unary("/Test/Call")(request, timeout=PATIENCE).decode()
        except grpc.RpcError as error:
            return error.code().name, error.details() or ""


def forged(genuine: Identity) -> Identity:
    """The same name, signed with a key of one's own."""
    key, signer = ec.generate_private_key(ec.SECP256R1()), ed25519.Ed25519PrivateKey.generate()
    root = make_authority("hospitals", key, utc_now())
    certificate = make_member(genuine.name, key.public_key(), signer.public_key(), root, key, utc_now(), 30)
    return Identity(
        peer_of(certificate), genuine.folder, pem(certificate), genuine.authority, to_pem(key, None), signer
    )


def test_only_a_valid_member_reaches_a_handler(federation: Federation, address: str, tmp_path: Path) -> None:
    site = federation.sites["site-a"]
    assert (
        call(secure_channel(site, address)) == ("OK", "here")
        and REACHED == ["site-a"]
        and reason(site, address) is None
    )
    REACHED.clear()

    # no certificate at all
    status, _ = call(grpc.secure_channel(address, grpc.ssl_channel_credentials(site.authority_pem)))
    assert status == "UNAVAILABLE"

    # the same name, signed by oneself; and by another federation's authority
    other = create(tmp_path / "other", "hospitals", ["localhost"], 30)
    stranger = load(other.issue("site-a", 30))
    stranger = Identity(
        stranger.peer, stranger.folder, stranger.certificate, site.authority, stranger.key, stranger.signer
    )
    for impostor in (forged(site), stranger):
        assert call(secure_channel(impostor, address))[0] == "UNAVAILABLE"
        refused(ExchangeClient(address, impostor, tmp_path / "x"), "T705", "did not sign")

    # ended
    past = utc_now() - timedelta(days=40)
    ended = load(federation.authority.renew("site-a", 30, now=past), now=past)
    assert call(secure_channel(ended, address))[0] == "UNAVAILABLE"
    refused(ExchangeClient(address, ended, tmp_path / "x"), "T704", "that expired")

    # the coordinator's clock is another: to the client its certificate looks right
    soon = load(
        federation.authority.renew("site-a", 30, now=utc_now() + timedelta(minutes=90)),
        now=utc_now() + timedelta(minutes=90),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedtune.exchange.tls_diagnosis.utc_now", lambda: utc_now() + timedelta(hours=1))
        refused(ExchangeClient(address, soon, tmp_path / "x"), "E802", "compare the clocks")

    # revoked: the connection stands, the door does not open
    revoke(federation.authority.place("coordinator"), "site-b")
    assert call(secure_channel(federation.sites["site-b"], address)) == (
        "PERMISSION_DENIED",
        said_of("site-b", federation),
    )
    refused(ExchangeClient(address, federation.sites["site-b"], tmp_path / "x"), "T706", "was revoked")

    # the coordinator is called by a name that its certificate does not hold; or is another one
    by_address = address.replace("localhost", "127.0.0.1")
    assert call(secure_channel(site, by_address))[0] == "UNAVAILABLE"
    refused(ExchangeClient(by_address, site, tmp_path / "x"), "E802", "is not for the name '127.0.0.1'")
    foreign = load(other.place("site-a"))
    assert call(secure_channel(foreign, address))[0] == "UNAVAILABLE"
    refused(ExchangeClient(address, foreign, tmp_path / "x"), "T705", "another authority")
    assert REACHED == []


def said_of(name: str, federation: Federation) -> str:
    """What the door says of a revoked key."""
    with pytest.raises(FedtuneError) as caught:
        federation.server.door.allowed.check(federation.sites[name].peer)
    return str(caught.value)


def refused(client: ExchangeClient, code: str, words: str) -> None:
    """Every call ends at once, with this error."""
    with pytest.raises(FedtuneError) as caught:
        client.status()
    client.close()
    assert caught.value.code == code and words in str(caught.value) and "\n" not in str(caught.value)


def test_what_is_no_exchange_is_said(federation: Federation, tmp_path: Path) -> None:
    web = http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    threading.Thread(target=web.serve_forever, daemon=True).start()
    refused(federation.client(address=f"localhost:{web.server_port}"), "E802", "does not use TLS")
    web.shutdown()
    web.server_close()
    refused(federation.client(address="localhost:1", patience=0.3), "E801", "localhost:1")


def test_an_unforeseen_error_tells_nothing_of_the_coordinator(federation: Federation, address: str) -> None:
    status, details = call(secure_channel(federation.sites["site-a"], address), b"fail")
    assert (
        status == "INTERNAL"
        and "X900" in details
        and "patient" not in details
        and "RuntimeError" not in details
    )
    assert (
        "patient_17" in [event.text for event in federation.told if hasattr(event, "text")][-1]
    )  # the coordinator's own log has it


def test_only_the_coordinators_keys_can_serve(federation: Federation) -> None:
    genuine = federation.coordinator
    for keys, code in (
        (federation.sites["site-a"], "T705"),
        (load(federation.authority.renew("coordinator", 30)), "T706"),
    ):
        federation.coordinator = keys
        if code == "T706":
            revoke(federation.authority.place("coordinator"), "coordinator", keys.peer.key[:12])
        with pytest.raises(FedtuneError, match=code):
            federation.start()
    federation.coordinator = genuine
    with pytest.raises(FedtuneError, match="E801"):
        federation.start(federation.server.address)  # taken


def test_keys_are_renewed_with_overlap(federation: Federation, address: str) -> None:
    """A client's old and new keys both work at once; the coordinator shows its new certificate from its next
    start on."""

    def shown(address: str) -> str:
        host, _, port = address.rpartition(":")
        with (
            socket.create_connection((host, int(port))) as plain,
            context(federation.sites["site-a"]).wrap_socket(plain, server_hostname=host) as secure,
        ):
            return peer_of(x509.load_der_x509_certificate(secure.getpeercert(True) or b"")).key

    old, new = federation.sites["site-a"], load(federation.authority.renew("site-a", 90))
    assert call(secure_channel(old, address))[0] == call(secure_channel(new, address))[0] == "OK"
    revoke(federation.authority.place("coordinator"), "site-a", old.peer.key[:12])
    assert (
        call(secure_channel(old, address))[0] == "PERMISSION_DENIED"
        and call(secure_channel(new, address))[0] == "OK"
    )

    before = federation.coordinator
    federation.coordinator = load(federation.authority.renew("coordinator", 90))
    assert shown(address) == before.peer.key and call(secure_channel(new, address))[0] == "OK"
    again = federation.start(also=(reached,), threads=1)
    assert (
        shown(again.address) == federation.coordinator.peer.key != before.peer.key
        and call(secure_channel(new, again.address))[0] == "OK"
    )
    again.stop(0)

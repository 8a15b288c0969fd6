"""A site whose network lets it out through an HTTP proxy only (CONNECT): states and updates pass it as they are,
under the coordinator's own TLS; a proxy that opens TLS is found out."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedtune.errors import FedtuneError
from fedtune.exchange import ExchangeClient
from fedtune.trust import load
from fedtune.trust.authority import create
from tests.exchange.federation import STATE, Federation

HOST = "gateway.hospitals.test"  # a name that only the proxy knows


class ConnectProxy:
    """CONNECT to any port of HOST; with `opens`, it ends TLS itself, as inspecting proxies do."""

    def __init__(self, opens: ssl.SSLContext | None = None, refuses: bool = False) -> None:
        self.opens, self.refuses, self.asked = opens, refuses, list[str]()
        self.seen = bytearray()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(near,), daemon=True).start()

    def _serve(self, near: socket.socket) -> None:
        try:
            head = b""
            while b"\r\n\r\n" not in head:
                head += near.recv(4096)
            method, target, *_ = head.decode().split()
            self.asked.append(f"{method} {target}")
            if self.refuses or method != "CONNECT" or not target.startswith(HOST):
                near.sendall(b"HTTP/1.1 403 Forbidden\r\n\r\n")
                return
            near.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
            if self.opens:
                near = self.opens.wrap_socket(near, server_side=True)
            far = socket.create_connection(("localhost", int(target.rpartition(":")[2])), 10)
            threading.Thread(target=self._pump, args=(far, near), daemon=True).start()
            self._pump(near, far)
        except (OSError, ValueError):
            near.close()

    def _pump(self, source: socket.socket, target: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                self.seen += data
                target.sendall(data)
            target.shutdown(socket.SHUT_RDWR)
        except OSError:
            return


@pytest.fixture
def federation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Federation]:
    made = Federation(tmp_path)
    made.server.stop(0)
    made.authority.renew("coordinator", 30, hosts=[HOST])
    made.coordinator = load(made.authority.place("coordinator"))
    made.server = made.start()
    for name in ("no_proxy", "NO_PROXY", "grpc_proxy", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    yield made
    made.close()


def through(federation: Federation, patience: float = 20.0) -> ExchangeClient:
    return federation.client("site-a", f"{HOST}:{federation.server.address.rpartition(':')[2]}", patience)


def test_states_and_updates_pass_a_proxy(federation: Federation, monkeypatch: pytest.MonkeyPatch) -> None:
    proxy = ConnectProxy()
    monkeypatch.setenv("https_proxy", proxy.url)
    client = through(federation)
    assert client.fetch(federation.ticket()) == STATE
    secret = b"an update that only the coordinator reads" * 100
    assert client.send(federation.ticket(), secret).size == len(secret)
    client.close()
    assert proxy.asked and set(proxy.asked) == {f"CONNECT {client.address}"}
    assert b"hospitals/client" not in proxy.seen and secret[:20] not in proxy.seen


def test_a_proxy_that_opens_tls_is_found_out(
    federation: Federation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has a certificate for the right name, of an authority of its own: nothing passes."""
    stranger = create(tmp_path / "proxy", "hospitals", [HOST], 30).place("coordinator")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(stranger / "certificate.pem", stranger / "key.pem")
    proxy = ConnectProxy(opens=context)
    monkeypatch.setenv("https_proxy", proxy.url)
    client = through(federation, 1.0)
    with pytest.raises(FedtuneError, match=r"E80[12]|T705"):
        client.status()
    client.close()
    assert proxy.asked and not proxy.seen


def test_a_proxy_that_says_no_is_named(federation: Federation, monkeypatch: pytest.MonkeyPatch) -> None:
    proxy = ConnectProxy(refuses=True)
    monkeypatch.setenv("https_proxy", proxy.url)
    client = through(federation, 1.0)
    with pytest.raises(FedtuneError, match=r"E80[12].*https_proxy=http://127.0.0.1"):
        client.status()
    client.close()

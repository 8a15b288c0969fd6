"""The port speaks TLS 1.3, and nothing before it."""

from __future__ import annotations

import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedtune.deploy.supervisor import environment
from fedtune.exchange import ExchangeClient
from fedtune.exchange.tls_diagnosis import context
from fedtune.trust import load
from fedtune.trust.authority import create


class Gateway:
    """A coordinator's exchange in a process of its own, with the environment that fedtune server gives it."""

    def __init__(self, root: Path) -> None:
        made = create(root / "keys", "hospitals", ["localhost"], 30)
        self.site = load(made.issue("site-a", 30))
        command = [
            sys.executable,
            "-m",
            "tests.exchange.serving",
            str(root / "exchange"),
            str(made.place("coordinator")),
            "0",
        ]
        self.process = subprocess.Popen(
            command, env=environment(root / "flower"), stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout
        self.address = self.process.stdout.readline().strip()


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    made = Gateway(tmp_path_factory.mktemp("tls"))
    yield made
    made.process.kill()
    made.process.wait()


def spoken(gateway: Gateway, version: ssl.TLSVersion, ciphers: str = "") -> str:
    """The version of a handshake as site-a, "" where none comes about."""
    own = context(gateway.site)
    own.minimum_version = own.maximum_version = version
    if ciphers:
        own.set_ciphers(ciphers)
    port = int(gateway.address.rpartition(":")[2])
    try:
        with (
            socket.create_connection(("localhost", port), 10) as plain,
            own.wrap_socket(plain, server_hostname="localhost") as secure,
        ):
            return str(secure.version()) if secure.recv(1) else ""
    except (ssl.SSLError, OSError):
        return ""


def test_one_version(gateway: Gateway, tmp_path: Path) -> None:
    assert spoken(gateway, ssl.TLSVersion.TLSv1_3) == "TLSv1.3"
    client = ExchangeClient(gateway.address, gateway.site, tmp_path, patience=30.0)  # our own clients
    assert client.status().newest_protocol
    client.close()


@pytest.mark.parametrize(
    "ciphers",
    ["", "ECDHE-ECDSA-AES128-GCM-SHA256", "ECDHE+AESGCM", "ALL:@SECLEVEL=0", "ECDHE-RSA-AES128-GCM-SHA256"],
)
def test_no_other(ciphers: str, gateway: Gateway) -> None:
    assert spoken(gateway, ssl.TLSVersion.TLSv1_2, ciphers) == ""

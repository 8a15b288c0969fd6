"""Addresses to listen on, tried before anything is begun: gRPC itself would share a port with another program without a word."""

from __future__ import annotations

import socket
import time

from fedtune.errors import FedtuneError

PATIENCE = 5.0  # seconds: a coordinator that was killed a moment ago may still be letting go of its port


def split_address(address: str, option: str) -> tuple[str, int]:
    """HOST:PORT as its parts; an IPv6 host stands in brackets. Raises C103."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536 or (":" in host and not host.startswith("[")):
        raise FedtuneError("C103", f"{option} '{address}'", "HOST:PORT such as fed.example.org:9443", "add the port, or correct it")
    return host.strip("[]"), int(port)


def require_free(address: str, option: str, patience: float = PATIENCE) -> None:
    """Raises E801 where the address is taken or is none of this machine."""
    host, port = split_address(address, option)
    end = time.monotonic() + patience
    while why := taken(host, port):
        if time.monotonic() > end:
            expected = "an address of this machine that no other program listens on"
            raise FedtuneError(
                "E801", f"{option} {address}, which cannot be listened on ({why})", expected, f"end the other program, or choose another {option}"
            )
        time.sleep(0.2)


def taken(host: str, port: int) -> str:
    """Why no server can be opened there, "" where one can. Binds for an instant, at each address that the name has."""
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, kind, _, _, where in found[:4]:
            with socket.socket(family, kind) as server:
                server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port in TIME_WAIT is free; one that is listened on is not
                if family == socket.AF_INET6:
                    server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                server.bind(where)
                server.listen(1)
    except OSError as error:
        return error.strerror or str(error)
    return ""

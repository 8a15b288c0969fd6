"""Addresses to listen on, tried before anything is begun: gRPC itself would share a port with another program
without a word."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Mapping

from fedtune.errors import FedtuneError

PATIENCE = 5.0  # seconds: a coordinator that was killed a moment ago may still be letting go of its port


def split_address(address: str, option: str) -> tuple[str, int]:
    """HOST:PORT as its parts; an IPv6 host stands in brackets. Raises C103."""
    host, _, port = address.rpartition(":")
    if (
        not host
        or not (port.isascii() and port.isdecimal() and 0 < int(port) < 65536)
        or (":" in host and not (host[0] == "[" and host[-1] == "]"))
    ):
        raise FedtuneError(
            "C103",
            f"{option} '{address}'",
            "HOST:PORT such as fed.example.org:9443",
            "add the port, or correct it",
        )
    return host.strip("[]"), int(port)


def require_free(addresses: Mapping[str, str], patience: float = PATIENCE) -> None:
    """Try HOST:PORT of every option, all at the same time: two of them may not be one.

    Raises C103 for what is no address, E801 where one is taken, also by another of them, or is none of this
    machine.
    """
    places = {option: split_address(address, option) for option, address in addresses.items()}
    end = time.monotonic() + patience
    while refused := first_refused(places):
        if time.monotonic() > end:
            option, why = refused
            others = [other for other in places if other != option and places[other][1] == places[option][1]]
            why += f"; {others[0]} has the same port" if others else ""
            found = f"{option} {addresses[option]}, which cannot be listened on ({why})"
            expected = "an address of this machine that no other program listens on"
            raise FedtuneError("E801", found, expected, f"end the other program, or choose another {option}")
        time.sleep(0.2)


def first_refused(places: Mapping[str, tuple[str, int]]) -> tuple[str, str] | None:
    """The option whose address cannot be had, and why; None where all can. Listens for an instant, at each
    address that a name has."""
    with contextlib.ExitStack() as held:
        for option, (host, port) in places.items():
            try:
                found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
                for family, kind, _, _, where in dict.fromkeys(found):
                    held.enter_context(listening(family, kind, where))
            except (OSError, UnicodeError) as error:
                return option, getattr(error, "strerror", None) or str(error)
    return None


def listening(
    family: int, kind: int, where: tuple[str, int] | tuple[str, int, int, int] | tuple[int, bytes]
) -> socket.socket:
    """A socket that listens there as gRPC's would: `::` stands for the addresses of IPv4 as well. Raises
    OSError."""
    server = socket.socket(family, kind)
    try:
        server.setsockopt(
            socket.SOL_SOCKET, socket.SO_REUSEADDR, 1
        )  # a port in TIME_WAIT is free; one that is listened on is not
        if family == socket.AF_INET6:
            server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(where[0] != "::"))
        server.bind(where)
        server.listen(1)
    except OSError:
        server.close()
        raise
    return server

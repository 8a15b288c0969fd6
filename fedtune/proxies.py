"""Proxies of the environment: programs of one machine talk to one another directly, whatever http_proxy
says."""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Mapping

LOOPBACK = ("127.0.0.1", "localhost", "::1")
NAMES = (
    "grpc_proxy",
    "https_proxy",
    "http_proxy",
    "all_proxy",
)  # in the order in which gRPC asks for them; HTTP clients ask for the last two

PASSWORD = re.compile(r"(?<=://)[^/]*@|^[^/]*@")


def spared(env: Mapping[str, str]) -> dict[str, str]:
    """What no_proxy has to be, in both spellings, so that loopback never goes through a proxy; what it said
    before stays."""
    before = [
        part.strip()
        for name in ("no_proxy", "NO_PROXY")
        for part in env.get(name, "").split(",")
        if part.strip()
    ]
    text = ",".join(dict.fromkeys([*before, *LOOPBACK]))
    return {"no_proxy": text, "NO_PROXY": text}


def is_loopback(address: str) -> bool:
    """Whether HOST or HOST:PORT is this machine."""
    host = address.rpartition(":")[0] if address.count(":") == 1 or "]" in address else address
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def proxy_for(address: str, env: Mapping[str, str] | None = None) -> str:
    """NAME=VALUE of the proxy through which a connection to HOST:PORT would go, "" where there is none or
    no_proxy names the host.

    A name and password in the value are left out: the text is for a terminal and its logs.
    """
    known = os.environ if env is None else env
    host = address.rpartition(":")[0].strip("[]").lower()
    exempt = [
        part.strip().lower().lstrip("*.")
        for name in ("no_proxy", "NO_PROXY")
        for part in known.get(name, "").split(",")
        if part.strip()
    ]
    if is_loopback(address) or any(part in ("", host) or host.endswith("." + part) for part in exempt):
        return ""
    spellings = [spelling for name in NAMES for spelling in (name, name.upper())]
    return next((f"{name}={PASSWORD.sub('', known[name])}" for name in spellings if known.get(name)), "")


def proxy_hint(address: str) -> str:
    """What to look at first where nobody answers at HOST:PORT and a proxy is set; "" where none is."""
    proxy = proxy_for(address)
    return (
        f" (connections go through {proxy}; if that is wrong, add the coordinator's name to no_proxy)"
        if proxy
        else ""
    )

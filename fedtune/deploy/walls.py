"""What Flower's programs at a site may reach of the disk (sandbox.py): Python, the system's libraries, one
folder of their own. No keys, no data, no home."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import fedtune

SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/nix/store", "/proc", "/sys")
# of the system, that programs read to find names, libraries and times; /etc itself may hold a site's keys
SETTINGS = (
    "alternatives",
    "ca-certificates",
    "gai.conf",
    "group",
    "host.conf",
    "hosts",
    "ld.so.cache",
    "ld.so.conf",
    "ld.so.conf.d",
    "localtime",
    "mime.types",
    "nsswitch.conf",
    "os-release",
    "passwd",
    "pki",
    "protocols",
    "resolv.conf",
    "services",
    "ssl",
    "timezone",
)
RESOLVERS = ("/run/systemd/resolve", "/run/resolvconf")


def walls(own: Path, private: Sequence[str]) -> dict[str, list[str]]:
    """Rules for sandbox.py. `own`: the folder that is theirs; `private`: keys, data, home and policy of the
    site."""
    secret = [Path(path).resolve() for path in private if path]
    package = Path(fedtune.__file__).resolve().parent
    read = [
        *SYSTEM,
        *(f"/etc/{name}" for name in SETTINGS),
        *RESOLVERS,
        sys.prefix,
        sys.base_prefix,
        str(package),
    ]
    listed: list[str] = []
    for entry in dict.fromkeys(path for path in sys.path if path and Path(path).exists()):
        holds = any(secret_path.is_relative_to(Path(entry).resolve()) for secret_path in secret)
        (listed if holds else read).append(
            entry
        )  # a checkout in which somebody keeps keys, too: its names, and of its files our own
    return {"read": read, "list": listed, "write": [str(own), "/dev/shm"], "devices": ["/dev"]}

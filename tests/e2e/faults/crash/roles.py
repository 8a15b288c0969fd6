"""The processes of a federation under test, by what they are there for. Standard library only:
sitecustomize.py imports it before anything else."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

ROOT, WHO = (
    "FLWR_TEST_ROOT",
    "FLWR_TEST_WHO",
    # in the environment of every process (FLWR_: Flower's programs see no others): which federation, and
    # whose
    # machine it plays
)
MODULES = {
    "fedtune.deploy.gateway": "gateway", "fedtune.deploy.worker": "worker", "fedtune.flower.prefork": "superexec",
}  # fmt: skip
SCRIPTS = {
    "flower-superlink": "superlink", "flower-superexec": "superexec", "flower-supernode": "supernode",
    "flwr-serverapp": "serverapp", "flwr-clientapp": "clientapp", "flwr": "flwr",
}  # fmt: skip


def role_of(command: list[str]) -> str:
    """gateway, worker, superlink, superexec, supernode, serverapp, clientapp, flwr; server or client for who
    looks after them; "" for others."""
    match command[1:]:
        case ["-m", "fedtune", ("server" | "resume"), *_]:
            return "server"
        case ["-m", "fedtune", "client", *_]:
            return "client"
        case ["-m", module, *_]:
            return MODULES.get(module, "")
        case [script, *_]:
            return SCRIPTS.get(Path(script).name, "")
    return ""


def role(process: Path) -> str:
    """The role of a process, by its folder in /proc."""
    name = process.joinpath("comm").read_text().strip()
    if name == "flwr-clientapp":  # a fork, whose command is its parent's
        return "clientapp"
    return role_of(process.joinpath("cmdline").read_text().split("\0"))


def mine() -> str:
    """The role of this process."""
    return role(Path("/proc/self"))


def processes(root: str, wanted: str = "", who: str = "") -> Iterator[tuple[int, str, str]]:
    """Process id, role and machine of every living process of a federation; the asking one is not among
    them."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            environment = path.joinpath("environ").read_bytes().split(b"\0")
            if f"{ROOT}={root}".encode() not in environment or int(path.name) == os.getpid():
                continue
            if path.joinpath("stat").read_text().rpartition(")")[2].split()[0] == "Z":
                continue
            found = role(path)
            whose = next(
                (
                    pair.decode().partition("=")[2]
                    for pair in environment
                    if pair.startswith(f"{WHO}=".encode())
                ),
                "",
            )
        except (OSError, ValueError):  # it has just ended, or is not ours
            continue
        if (not wanted or found == wanted) and (not who or whose == who):
            yield int(path.name), found, whose

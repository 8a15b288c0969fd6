"""Programs at a site, kept from its files: python -SE sandbox.py RULES PARENT COMMAND ...

For Flower's programs, and for the site's own training script. No code comes from elsewhere (app.py); this is
for mistakes in code that is here. The kernel (Landlock, Linux
5.13 on, no privileges needed) lets the
program and all that it starts read what Python and the system need, and write one folder. Where the kernel
cannot, the program starts as it is and
says so in its log. Standard library only, and run as a file: what comes after must be able to import
everything anew.

RULES is JSON: {"read": [...], "list": [...], "write": [...]}, paths with all below them, and "but": [...] for
all of the disk except these, which can be read and written; PARENT is who started it, with whose end the
program ends.
"""

from __future__ import annotations

import ctypes
import json
import os
import struct
import sys
from collections.abc import Iterator

CREATE, ADD, RESTRICT = 444, 445, 446  # system calls, the same numbers on every machine since Linux 5.13
PDEATHSIG, DROP_CAPABILITY, NO_NEW_PRIVILEGES, SIGKILL = 1, 24, 38, 9
EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = 1, 2, 4, 8
CHANGE = sum(1 << bit for bit in range(4, 13))  # make and remove anything
REFER = 1 << 13  # move between folders, since the second version
TRUNCATE = 1 << 14  # since the third version
FILE = EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE


def restrict(rules: dict[str, list[str]]) -> str:
    """Bind this process and all that it starts; why not, "" where it is bound."""
    libc = ctypes.CDLL(None, use_errno=True)
    for capability in range(
        64
    ):  # of root, where it is: with some of them it could read the memory of others in spite of the rules
        libc.prctl(DROP_CAPABILITY, capability, 0, 0, 0)
    version = libc.syscall(CREATE, None, 0, 1)
    if version < 1:
        return os.strerror(ctypes.get_errno())
    every = EXECUTE | WRITE_FILE | READ_FILE | READ_DIR | CHANGE
    every |= (REFER if version >= 2 else 0) | (TRUNCATE if version >= 3 else 0)
    attribute = struct.pack("=Q", every)
    ruleset = libc.syscall(CREATE, attribute, len(attribute), 0)
    if ruleset < 0:
        return os.strerror(ctypes.get_errno())
    closed = rules.get("but", [])
    places = {**rules, "around": list(around(closed)) if closed else []}
    for kind, access in (
        ("read", EXECUTE | READ_FILE | READ_DIR),
        ("list", READ_DIR),
        ("write", every),
        ("around", every),
        ("devices", READ_FILE | READ_DIR | WRITE_FILE),
    ):
        for path in places.get(kind, []):
            try:
                place = os.open(path, os.O_PATH | os.O_CLOEXEC)
            except OSError:
                continue  # a system without it
            allowed = access & every & (every if os.path.isdir(path) else FILE)
            libc.syscall(ADD, ruleset, 1, struct.pack("=Qi", allowed, place), 0)
            os.close(place)
    if libc.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0) or libc.syscall(RESTRICT, ruleset, 0):
        return os.strerror(ctypes.get_errno())
    os.close(ruleset)
    return ""


def around(secret: list[str]) -> Iterator[str]:
    """Everything on the disk but these paths and the folders that lead to them. No links: a rule about one
    would be about what it leads to."""
    closed = {path for path in secret if not any(path.startswith(f"{other}/") for other in secret)}
    above = {"/", *(path[:at] for path in closed for at in range(1, len(path)) if path[at] == "/")}
    for folder in sorted(above):
        try:
            entries = list(os.scandir(folder))
        except OSError:
            continue
        for entry in entries:
            if entry.path not in above | closed and not entry.is_symlink():
                yield entry.path


def main() -> None:
    rules, parent, *command = sys.argv[1:]
    ctypes.CDLL(None).prctl(PDEATHSIG, SIGKILL)
    if os.getppid() != int(parent):
        sys.exit(1)
    if why := restrict(json.loads(rules)):
        sys.stderr.write(f"this system cannot keep this program from the site's files (Landlock: {why})\n")
        sys.stderr.flush()
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()

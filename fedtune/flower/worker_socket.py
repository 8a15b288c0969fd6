"""A ClientApp's way to the worker beside it: one line of JSON each way over a Unix socket. Imports nothing
heavy: a process lives for one message."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Mapping
from typing import Any

from fedtune.errors import FedtuneError


def through(
    path: str, request: Mapping[str, Any], seconds: float = 60.0, patience: float | None = None
) -> dict[str, Any]:
    """A request to the worker; waits `seconds` for one that is just being started, and `patience` for its
    answer. Raises FedtuneError F505."""
    end = time.monotonic() + seconds
    while True:
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as call:
                call.settimeout(patience)
                call.connect(path)
                with call.makefile("rwb") as file:
                    file.write(json.dumps(dict(request)).encode() + b"\n")
                    file.flush()
                    if line := file.readline():
                        answer: dict[str, Any] = json.loads(line)
                        return answer
        except OSError:
            pass
        if time.monotonic() > end:
            raise FedtuneError(
                "F505",
                sentence="this site's worker process is not running",
                do="look at the site's worker.log",
            )
        time.sleep(0.25)

"""A worker's socket: a line of JSON each way, from ClientApps of the same machine and from fedtune client."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedtune.deploy.worker import Worker

LONGEST = 4 << 20  # bytes of a request: a ticket with its recipe
IDLE = 5.0  # seconds without work after which old updates are tried again


def serve(worker: Worker, path: Path) -> None:
    """Answer on a Unix socket until the process ends; a thread a caller, because ClientApps may overlap."""
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        os.chmod(path, 0o600)
        listener.listen(8)
        listener.settimeout(IDLE)
        while True:
            try:
                caller, _ = listener.accept()
            except TimeoutError:
                worker.idle()
                continue
            threading.Thread(target=attend, args=(worker, caller), daemon=True).start()


def attend(worker: Worker, caller: socket.socket) -> None:
    """One request and its answer, a line of JSON each. A defect ends the worker: what it left half-done is
    done again by its next life."""
    caller.settimeout(None)
    with caller, contextlib.suppress(OSError), caller.makefile("rwb") as file:
        try:
            line = file.readline(LONGEST)
            file.write(json.dumps(worker.answer(json.loads(line))).encode() + b"\n")
            file.flush()
        except (OSError, ValueError):
            return
        except BaseException as error:
            sys.stderr.write(f"worker: {type(error).__name__}: {error}\n")
            sys.stderr.flush()
            os._exit(1)

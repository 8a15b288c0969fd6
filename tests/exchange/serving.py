"""A coordinator's exchange as a process of its own, to be killed: python -m tests.exchange.serving FOLDER
KEYS PORT [POINT]

POINT names where it kills itself, once: "adopted" (the update is in its place, no row says so) or "counted"
(the row is
committed, nobody was told).
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from fedtune.exchange import Limits, ServerStore, serve
from fedtune.exchange.objects import Store
from fedtune.exchange.uploads import Uploads
from fedtune.trust import load


def die_after(owner: Any, name: str) -> None:
    """Let a method do its work, then vanish as if the power were cut."""
    whole = getattr(owner, name)

    def dying(*arguments: Any) -> Any:
        whole(*arguments)
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(owner, name, dying)


def main(folder: str, keys: str, port: str, point: str = "") -> None:
    if point:
        die_after(*{"adopted": (Store, "adopt"), "counted": (Uploads, "take")}[point])
    server = serve(ServerStore(Path(folder)), load(Path(keys)), f"localhost:{port}", Limits(free_bytes=0))
    print(server.address, flush=True)
    while True:
        time.sleep(60)


if __name__ == "__main__":
    main(*sys.argv[1:])

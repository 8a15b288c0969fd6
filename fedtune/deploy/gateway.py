"""The coordinator's gateway: one port for everything that comes from sites, in one process.

States and updates (the exchange), Flower's fleet API (passage.py), and, for split models, the body. It is
separate from the runs, so
that sites can fetch and send while a run is being restarted, and it holds nothing that is not on disk.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fedtune.deploy.coordinator_run import SPLIT_KEY
from fedtune.deploy.fleet_proxy import behind
from fedtune.deploy.members import Members
from fedtune.deploy.metrics import Refusals, serve_metrics
from fedtune.deploy.status import Ends, statuses
from fedtune.deploy.supervisor import LOG, end_with_parent
from fedtune.errors import FedtuneError
from fedtune.exchange import Limits, ServerStore, serve
from fedtune.quiet import quiet
from fedtune.runtime.folder import existing, recipe_of
from fedtune.runtime.paths import located
from fedtune.sinks.jsonl import jsonl_sink
from fedtune.trust import load
from fedtune.trust.private import shared_key
from fedtune.trust.renewal import FOLDER, Desk
from fedtune.trust.roster import FILE

SMALL_CALLS = 32  # threads for calls of SuperNodes, each a fraction of a second


@dataclass(frozen=True)
class GatewayConfig:
    """What the gateway is told by whoever starts it.

    keys       the coordinator's folder
    home       of the coordinator; the exchange's folder is home/exchange
    listen     host:port
    superlink  host:port on loopback
    metrics    host:port of the Prometheus endpoint, "" for none
    connections  of one address at once
    body       folder of a run whose model is split, "" for none: its body is served here
    """

    keys: str
    home: str
    listen: str
    superlink: str
    metrics: str = ""
    body: str = ""
    connections: int = 256

    @classmethod
    def read(cls, path: Path) -> GatewayConfig:
        return cls(**json.loads(path.read_text()))

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))


def body(config: GatewayConfig, server_store: ServerStore) -> dict[str, Any]:
    """The body service of a split run, and what it needs of the server. Loads the body's blocks and nothing
    else. Raises S701, S702, S704, M301."""
    from fedtune.exchange.split_service import alongside, body_service, over
    from fedtune.split.session import Tokens

    tokens = Tokens(shared_key(Path(config.home) / SPLIT_KEY))
    run = existing(config.body)
    return alongside(body_service(located(recipe_of(run), run.origin()), tokens, over(server_store.ledger)))


def all_descriptors() -> None:
    """As many open connections as this process may have, whatever a shell sets by habit."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def main() -> None:
    quiet()
    end_with_parent()
    all_descriptors()
    config = GatewayConfig.read(Path(sys.argv[1]))
    home = Path(config.home)
    done = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: done.set())
    try:
        server_store = ServerStore(home / "exchange")
        identity, desk = load(Path(config.keys)), Desk(home / FOLDER)
        tell = Refusals(jsonl_sink(home / "gateway.jsonl", LOG))
        more: dict[str, Any] = body(config, server_store) if config.body else {"also": [], "threads": 0}
        more |= {
            "also": [
                *more["also"],
                behind(
                    config.superlink,
                    Members(home),
                    Ends(home.parent, server_store.ledger.is_member),
                    Path(config.keys) / FILE,
                    lambda peer, content: desk.hand_in(peer, content, identity),
                ),
            ],
            "threads": more["threads"] + SMALL_CALLS,
        }
        server = serve(
            server_store,
            identity,
            config.listen,
            Limits(connections=config.connections),
            tell=tell,
            runs=lambda: statuses(home.parent),
            **more,
        )
        if config.metrics:
            serve_metrics(config.metrics, server, home, tell)
    except FedtuneError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(error.exit_code)
    done.wait()
    server.stop(2.0)
    server_store.close()


if __name__ == "__main__":
    main()

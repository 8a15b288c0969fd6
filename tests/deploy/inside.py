"""A deployment without processes: real keys, exchange, workers and conduct; only Flower's grid is a fake that
calls the workers at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fedtune.deploy.coordinator_run import Deployed, conduct
from fedtune.deploy.server import begin
from fedtune.deploy.site_config import SiteConfig
from fedtune.deploy.worker import Worker
from fedtune.events import Event
from fedtune.exchange import Limits, Server, ServerStore, serve
from fedtune.runtime.folder import RunFolder, recipe_of
from fedtune.trust import load
from fedtune.trust.authority import Authority, create
from tests import small

SITES = ("site-a", "site-b", "site-c")


class FakeGrid:
    """Flower's Grid without Flower. A node is a worker that is called at once; `instead` may answer, or lose,
    a message before it.

    instead   (node, message) -> a reply, None for silence, or ... to let the worker answer
    """

    def __init__(
        self, workers: dict[int, Worker], instead: Callable[[int, Message], Any] = lambda node, message: ...
    ) -> None:
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = (
            1,
            1,
            1,
        )  # without them Flower makes no message
        self.workers, self.instead = workers, instead
        self.replies: dict[str, Message] = {}
        self.pushed: list[tuple[int, str]] = []  # node, kind

    def get_node_ids(self) -> list[int]:
        return list(self.workers)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        return [self._take(message) for message in messages]

    def _take(self, message: Message) -> str:
        node = message.metadata.dst_node_id
        name = message.metadata.__dict__["_message_id"] = f"m{len(self.pushed)}"
        self.pushed.append((node, message.metadata.message_type))
        answer = self.instead(node, message)
        if answer is ...:
            answer = answered(self.workers[node], message)
        if answer is not None:
            self.replies[name] = answer
        return name

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        return [self.replies.pop(name) for name in message_ids if name in self.replies]


def answered(worker: Worker, message: Message) -> Message:
    """What the client's door does (flower/site_app.py), without the socket."""
    if message.metadata.message_type == "query.site":
        said = worker.answer({"what": "site", "nonce": bytes(message.content["site"]["nonce"]).hex()})
        return Message(
            RecordDict({"site": ConfigRecord({"sealed": str(said["sealed"]).encode()})}), reply_to=message
        )
    said = worker.answer({"what": "ticket", "ticket": bytes(message.content["ticket"]["ticket"]).decode()})
    return Message(
        RecordDict({"outcome": ConfigRecord({part: str(text) for part, text in said.items()})}),
        reply_to=message,
    )


def lost(message: Message) -> Message:
    """Flower's own error reply for a node that has gone."""
    return Message(Error(5, "Node Unavailable"), reply_to=message)


class Inside:
    """A coordinator's folder with one run, its exchange on a real socket, and a worker a site."""

    def __init__(self, root: Path, model: Path, data: Path, **changes: Any) -> None:
        self.root = root
        self.authority: Authority = create(root / "keys", "hospitals", ["localhost"], 30)
        for site in SITES:
            self.authority.issue(site, 30)
        self.keys = self.authority.place("coordinator")
        recipe = small.recipe(
            model, data, **{"partition__clients": 3, "deploy__data": "partition", **changes}
        )
        self.folder: RunFolder = begin(recipe, "run", root / "runs", self.keys, "localhost:0")
        self.recipe = recipe_of(self.folder)
        self.run = Deployed.read(self.folder).run
        self.server_store = ServerStore(root / "runs" / ".coordinator" / "exchange")
        self.server: Server = serve(self.server_store, load(self.keys), "localhost:0", Limits(free_bytes=0))
        self.told: dict[str, list[Event]] = {site: [] for site in SITES}

    def worker(self, site: str, kind: type[Worker] = Worker, **more: Any) -> Worker:
        """A life of a site's worker."""
        home = self.root / f"home-{site}"
        home.mkdir(exist_ok=True)
        more = more if "data" in more else {"partition": True, **more}
        config_ = SiteConfig(
            str(self.authority.place(site)), self.server.address, str(home), str(home / "socket"), **more
        )
        return kind(config_, self.told[site].append)

    def workers(self, **more: Any) -> dict[int, Worker]:
        return {101 + number: self.worker(site, **more) for number, site in enumerate(SITES)}

    def conduct(self, grid: FakeGrid) -> None:
        conduct(grid, self.folder)

    def close(self) -> None:
        self.server.stop(0)
        self.server_store.close()


@contextmanager
def inside(root: Path, model: Path, data: Path, **changes: Any) -> Iterator[Inside]:
    made = Inside(root, model, data, **changes)
    try:
        yield made
    finally:
        made.close()

"""A site's warm worker: it holds model and data for as long as it lives, and does what signed tickets ask.

Flower starts a ClientApp process for every message; that process only hands the ticket to this one, over a
socket in a folder that nobody else may open. An update is on disk before it is sent, and what the client
remembers is on disk before the update is: a worker that dies goes on where it was, and never computes twice
what it has finished.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedtune import progress
from fedtune.config import Recipe, method_of
from fedtune.data import Federation, histogram
from fedtune.deploy.approval import approved
from fedtune.deploy.declared import declared
from fedtune.deploy.own_trainer import OwnTrainer, require_trainable
from fedtune.deploy.policy import Asked, read_policy
from fedtune.deploy.resources import require_disk, require_memory
from fedtune.deploy.site_books import DAY, Sent, forget, note_sent, sent_since
from fedtune.deploy.site_config import SiteConfig, require_own, with_own_model
from fedtune.deploy.site_privacy import charge, cover, require_within
from fedtune.deploy.sites import Details, at_site, columns_of, understood
from fedtune.deploy.ticket_window import TicketWindow
from fedtune.deploy.watchdog import PACE, STILL, Watchdog, first_to_go, weights_at
from fedtune.deploy.worker_listener import serve
from fedtune.errors import FedtuneError, Refused
from fedtune.events import Event, Noted
from fedtune.exchange import ExchangeClient
from fedtune.model.token_cache import TokenCache
from fedtune.panics import panics_as_errors
from fedtune.runtime.checkpoints import ClientStates
from fedtune.runtime.client_half import respond, state_after, state_before
from fedtune.runtime.client_store import FolderVault, load_versions, save_versions
from fedtune.runtime.failures import failure_of, numbered
from fedtune.runtime.masked_tasks import root_of
from fedtune.runtime.protocol import Ask, Link
from fedtune.runtime.site_scores import SCORE
from fedtune.runtime.workspace import Workspace, build_workspace, link_of
from fedtune.sinks.jsonl import jsonl_sink
from fedtune.split.facts import SplitFacts
from fedtune.trust import Peer, Signed, Ticket, load, ticket
from fedtune.trust.certificates import utc_now
from fedtune.trust.chained_log import FILE, ChainedLog
from fedtune.trust.envelope import PROTOCOL
from fedtune.trust.roster import Roster, pinned
from fedtune.trust.signed import seal, signer
from fedtune.types import Round
from fedtune.versions import versions

if TYPE_CHECKING:
    from fedtune.model.base import Base

HUB_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?")
IDLE = "waiting for a question"
TOLD = 1.0  # seconds between two words of how far it is
PATIENCE = 600.0  # seconds to go on trying to send before Flower is told


@dataclass(frozen=True)
class WorkspaceBuilt(Event):
    """Model and data were loaded: once a recipe and life of a worker."""

    run: str
    seconds: float
    trainable: int
    total: int


class Worker:
    """One site's work, one ticket at a time."""

    def __init__(self, config: SiteConfig, tell: Callable[[Event], None]) -> None:
        self.config, self.tell = config, tell
        self.home = Path(config.home)
        self.identity = load(Path(config.keys))
        self.policy = read_policy(config.policy)
        self.log = ChainedLog(self.home / FILE, lambda: self.identity)
        self.exchange = ExchangeClient(
            config.coordinator, self.identity, self.home, PATIENCE, config.cache_bytes
        )
        self.tidied = -DAY
        self.window = TicketWindow(self.home)
        self.watchdog = Watchdog(Path(config.socket).parent)
        self.lock = threading.Lock()
        self.trainer = OwnTrainer.of(config, self.policy)
        self.built: tuple[str, Workspace, Link] | None = None
        # threads that ask something now; when the last one left
        self.callers, self.left = set[int](), time.monotonic()

    def answer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """What a ClientApp asks: who this is, or that a ticket be done; and what fedtune client asks: for how
        long nobody has asked anything."""
        if request.get("what") == "idle":
            return {"seconds": 0.0 if self.callers else time.monotonic() - self.left}
        self.callers.add(threading.get_ident())
        try:
            return (
                {"sealed": self.site(str(request["nonce"]))}
                if request.get("what") == "site"
                else self.outcome(str(request["ticket"]).encode())
            )
        finally:
            self.callers.discard(threading.get_ident())
            self.left = time.monotonic()

    def outcome(self, content: bytes) -> dict[str, Any]:
        """A ticket, one at a time; where it was not done, a code and a number: the sentence stays here."""
        with self.lock, progress.heard_by(self.tell, TOLD):
            try:
                with panics_as_errors():
                    return {"code": "", "said": self.done(content)}
            except Exception as cause:  # whatever it is, it is about this ticket: the worker lives on
                outcome, sentence = numbered(failure_of(cause, self.identity.name.name, self.home / "errors"))
                self.tell(Noted(sentence))
                with contextlib.suppress(FedtuneError):  # a log that is not in order has said so already
                    self.log.write("refused", utc_now(), sentence=sentence, **outcome)
                return outcome
            finally:
                progress.say(IDLE)

    def site(self, nonce: str) -> str:
        """Name and means of this site, under its signature."""
        record = json.dumps(
            {"nonce": nonce, "name": self.identity.name.name, "report": self.report()}, sort_keys=True
        ).encode()
        return seal(record, self.identity).to_json().decode()

    def report(self) -> dict[str, Any]:
        """What this site can do: its device, how fast that is, bytes free, how much data it has, its
        versions."""
        from fedtune.model.hardware import means, speed

        can = {**means(self.config.device), "speed": round(speed(self.config.device), 1)}
        return {
            **can,
            **declared(self.config.data, self.config.shared),
            "disk": shutil.disk_usage(self.home).free,
            "protocol": PROTOCOL,
            "versions": versions(),
        }

    def done(self, content: bytes) -> str:
        """A ticket, done: its receipt is held. Returns what the chain chose. Raises FedtuneError."""
        about = ticket.read(content, self.identity)
        details = Details.decode(about.details)
        details.require_open(time.time())
        self.speaker(content)
        self.window.take(about.run, details.issued, time.time())
        recipe = understood(details, about.verb)
        if known := self.roster():
            known.check_recipe(recipe.fingerprint)
        mine = self.own(recipe)
        if self.exchange.held(about):
            return ""
        if self.trainer:
            require_trainable(recipe)
        self.policy.check(mine, self.asked(content, about, details, recipe))
        require_within(self.policy, self.home, recipe, about.verb)
        require_disk(self.home, about)
        workspace, link = self.prepared(recipe, mine, details, about.verb)
        if link.base != about.base:
            adapter = workspace.tunable.settings
            sparse = adapter is not None and adapter.sparse
            what = "weights, tokenizer and chat template"
            what += "; of a sparse kind also which weights it trains, where LAPACK may differ" * sparse
            found = f"base model {link.base[:12]} at this site ({what})"
            raise Refused(
                "W604",
                found,
                f"{about.base[:12]} as at the coordinator",
                "use the same files, or name them with --model",
            )
        if link.tasks[about.verb].trains:
            self.policy.check_rows(workspace.recipe, len(workspace.train(details.number)))
            mine_here = workspace.federation.clients[details.number].train
            self.policy.check_classes(about.verb, histogram(mine_here))
        with self.watchdog.bounded(f"an answer to run '{about.run}'", 60.0 * self.policy.minutes):
            return self.computed(about, details, workspace, link)

    def prepared(self, recipe: Recipe, mine: Recipe, details: Details, verb: str) -> tuple[Workspace, Link]:
        """Model, data and rows as tokens, within bounds of time and memory. Raises ClientFailed M311."""
        from fedtune.model.device import pick_device
        from fedtune.model.hardware import free_memory

        weights = weights_at(Path(mine.model.name).expanduser())
        # a CUDA driver maps what it never touches; there the kernel decides, and takes this process first
        most = free_memory() + 2 * weights if pick_device(mine.model.device).type == "cpu" else 0
        with self.watchdog.bounded(f"model '{mine.model.name}'", STILL + weights / PACE, most):
            workspace, link = self.workspace(recipe, mine, details)
            if link.tasks[verb].trains:
                workspace.train(details.number)
            elif verb == SCORE:
                workspace.held_out(details.number)
        return workspace, link

    def asked(self, content: bytes, about: Ticket, details: Details, recipe: Recipe) -> Asked:
        """For the policy: who asks for what, and what has left this house lately."""
        key = self.speaker(content).key
        sent = sent_since(self.home, time.time() - DAY)
        known, verb = approved(self.home, self.policy.approvals), root_of(about.verb)
        return Asked(recipe.fingerprint, verb, about.budget, len(details.members), key, known, sent)

    def speaker(self, content: bytes) -> Peer:
        """Who signed a ticket, where the newest list of members that this site has names it. Raises T702 to
        T707."""
        peer, now = signer(Signed.from_json(content), self.identity.authority, utc_now(), "ticket"), utc_now()
        if known := self.roster():
            known.check(peer, now)
        return peer

    def roster(self) -> Roster | None:
        """The newest list that the authority has signed, as far as this site has it."""
        places = [self.identity.folder, self.home]
        return pinned(places, self.identity.authority, self.identity.name.federation)

    def computed(self, about: Ticket, details: Details, workspace: Workspace, link: Link) -> str:
        ask = Ask(
            details.number,
            about.verb,
            Round(about.round, details.seed, details.members),
            self.exchange.fetch(about),
            details.last,
            details.first,
        )
        place = self.home / "memory" / about.run
        body = None
        if link.method.capabilities.split:
            from fedtune.exchange.split_service import body_address

            body = body_address(
                self.identity, self.config.coordinator, about.run, SplitFacts.from_words(details.told)
            )
        rows = len(
            workspace.held_out(details.number) if about.verb == SCORE else workspace.train(details.number)
        )
        self.tell(
            Noted(
                f"asked: '{about.verb}' in round {about.round} of run {about.run}, recipe {link.run}, of "
                f"{rows:,} rows"
            )
        )
        held = load_versions(place, ask.client)
        vault = FolderVault(self.home / "vault" / about.run)
        client = replace(workspace.client_with(ask.client, state_before(held, ask)), body=body, vault=vault)
        directed = about.verb in link.tasks and link.tasks[about.verb].directed
        reply = respond(link, client, ask, cover(self.policy, about.verb, directed))
        save_versions(place, ask.client, state_after(held, ask, client.state))
        size, sha256 = len(reply.payload), hashlib.sha256(reply.payload).hexdigest()
        charge(self.policy, self.home, workspace.recipe, about, ask.client, sha256)
        note_sent(
            self.home,
            Sent(time.time(), size, about.run, about.round, about.verb, link.run, rows, sha256),
            self.log,
        )
        self.log.write("receipt", utc_now(), **asdict(self.exchange.send(about, reply.payload)))
        self.tell(
            Noted(
                f"sent: {size:,} bytes for round {about.round} of run {about.run}, sha256 {sha256[:16]}, and "
                "its receipt is held"
            )
        )
        return reply.said

    def own(self, recipe: Recipe) -> Recipe:
        """The coordinator's recipe with this site's paths and means."""
        if (
            not self.config.model
            and not self.config.partition
            and (not HUB_NAME.fullmatch(recipe.model.name) or Path(recipe.model.name).exists())
        ):
            raise FedtuneError(
                "F507",
                sentence="the recipe's base model is not a name on the hub, "
                "and this site was given no folder of its own",
                do="start it with: fedtune client --model DIR",
            )
        return with_own_model(recipe, self.config)

    def workspace(self, recipe: Recipe, mine: Recipe, details: Details) -> tuple[Workspace, Link]:
        """Model and data of a recipe, loaded at its first ticket."""
        method = method_of(recipe)
        split = method.capabilities.split
        facts = SplitFacts.from_words(details.told) if split else None
        model = json.dumps([details.recipe, facts.model if facts else None])
        if self.built and self.built[0] == model:
            return self.built[1:]
        self.built = None  # two models may not fit
        began = time.monotonic()
        if recipe.deploy.sites[details.number : details.number + 1] != (self.identity.name.name,):
            raise Refused(
                "W604",
                f"number {details.number} of {len(recipe.deploy.sites)} sites",
                f"that of '{self.identity.name.name}'",
                "report this",
            )
        c = self.config
        federation = at_site(mine, details.number, c.data, c.partition, columns_of(c.columns), c.shared)
        require_memory(mine, len(federation.labels), mine.model.device)

        def load_ends(known: Federation) -> Base:  # of a model that is split, a site holds the ends only
            assert split is not None and facts is not None
            return split.load_site(mine.model, mine.data.task, known.labels, mine.seed, facts)

        workspace = build_workspace(
            mine,
            method,
            ClientStates(None),
            self.tell,
            federation,
            load_ends if split else None,
            alive=self.watchdog.alive,
            tokens=TokenCache(self.home / "tokens", c.cache_bytes),
        )
        if self.trainer:
            workspace.tunable.trainer = self.trainer.fit
        self.built = model, workspace, link_of(workspace, method, recipe)
        self.tell(
            WorkspaceBuilt(
                recipe.fingerprint[:16],
                time.monotonic() - began,
                workspace.tunable.trainable,
                workspace.tunable.total,
            )
        )
        return self.built[1:]

    def idle(self) -> None:
        """What there is time for while nobody asks anything."""
        if any(True for _ in self.exchange.outbox.waiting()):
            self.flush()
        if self.config.keep_days and time.monotonic() > self.tidied + DAY:
            self.tidied = time.monotonic()
            with contextlib.suppress(FedtuneError):  # a full disk, which a ticket says
                forget(self.home, self.config.keep_days)

    def flush(self) -> None:
        """Updates of before that have no receipt yet; what cannot be sent now is kept."""
        if self.lock.acquire(blocking=False):
            try:
                for receipt in self.exchange.flush():
                    self.tell(Noted(f"an update of round {receipt.round} was sent later"))
            except Exception as cause:  # whatever it is, it is about this ticket: the worker lives on
                error = failure_of(cause, self.identity.name.name, self.home / "errors")
                self.tell(Noted(str(error)))
            finally:
                self.lock.release()


def main() -> None:
    from fedtune.deploy.supervisor import LOG, end_with_parent
    from fedtune.quiet import quiet

    quiet()
    end_with_parent()
    first_to_go()
    config = SiteConfig.read(Path(sys.argv[1]))
    tell = jsonl_sink(Path(config.home) / "worker.jsonl", LOG)
    try:
        require_own(config)
        serve(Worker(config, tell), Path(config.socket))
    except FedtuneError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()

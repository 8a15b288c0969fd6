"""A run on real sites, inside Flower's ServerApp process: the same rounds, journal and bytes as anywhere,
over the exchange."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fedtune.config import Recipe, decided, method_of
from fedtune.deploy.declared import heaviest
from fedtune.deploy.members import bound
from fedtune.deploy.sites import at_coordinator
from fedtune.deploy.supervisor import end_with_parent
from fedtune.deploy.transport import PAUSE, Exchanged
from fedtune.errors import FedtuneError, Refused
from fedtune.events import Noted
from fedtune.exchange import ServerStore
from fedtune.flower.nodes import Judge, Nodes, Site, memory_of, read_report
from fedtune.runtime.audit import audit_sink
from fedtune.runtime.client_half import asked_with
from fedtune.runtime.folder import RunFolder, recipe_of
from fedtune.runtime.paths import located
from fedtune.runtime.protocol import Ask, Link
from fedtune.runtime.run import run
from fedtune.runtime.sampling import wanted
from fedtune.runtime.workspace import Workspace
from fedtune.sinks import sink_of
from fedtune.sinks.console import size
from fedtune.transforms import build
from fedtune.trust import AllowList, Identity, Signed
from fedtune.trust.certificates import utc_now
from fedtune.trust.identity import ALLOWED, following
from fedtune.trust.private import shared_key
from fedtune.trust.signed import signer

DEPLOY, FAILED, CRASH = "deploy.json", "failed.json", "crash.log"
GIVEN_UP = ("R405", "R409", "R412", "R413")  # too few answers: when the run goes on, the round is asked anew
SPLIT_KEY = "split.key"  # in the coordinator's home: what the runs and the gateway know of each other


@dataclass(frozen=True)
class Deployed:
    """deploy.json of a run's folder: where the coordinator's things are.

    keys, home  folders of the coordinator; the exchange's is home/exchange
    run         the run's name on the exchange, drawn once: no other run's updates can be taken for its own
    address     where the coordinator listens
    recipe      fingerprint of the recipe as it was given; config.json holds what became of it
    metrics     address of the Prometheus endpoint, "" for none
    connections  of one address at once
    """

    keys: str
    home: str
    run: str
    address: str
    recipe: str
    metrics: str = ""
    connections: int = 256

    def write(self, folder: RunFolder) -> None:
        folder.write_json(DEPLOY, asdict(self))

    @classmethod
    def read(cls, folder: RunFolder) -> Deployed:
        return cls(**folder.read_json(DEPLOY))


def conduct(grid: Any, folder: RunFolder) -> None:
    """All rounds that are not committed yet. A mistake is left in failed.json as its code and sentence, and
    raised."""
    end_with_parent()
    (folder.path / FAILED).unlink(missing_ok=True)
    try:
        carried(grid, folder)
    except FedtuneError as error:
        if error.code != "R407":  # one process too many: the other goes on
            folder.write_json(
                FAILED, {"code": error.code, "sentence": str(error), "exit_code": error.exit_code}
            )
        raise
    # a defect, or a SuperLink that was lost: fedtune server tries again, and this is where to look if that
    # does not help
    except Exception:
        (folder.path / CRASH).write_text(traceback.format_exc())
        raise


def carried(grid: Any, folder: RunFolder) -> None:
    where, recipe = Deployed.read(folder), recipe_of(folder)
    signing = following(Path(where.keys))
    tell = sink_of(folder.path, recipe.sinks, audit_sink(folder, signing))
    coordinator = signing()
    server_store = ServerStore(Path(where.home) / "exchange")
    at, allowed = bound(Path(where.home)), AllowList(coordinator.folder / ALLOWED)

    def theirs() -> list[int] | None:
        known = at()
        return None if known is None else [known[name] for name in recipe.deploy.sites if name in known]

    nodes = Nodes(
        grid,
        judge_of(coordinator, recipe.deploy.sites),
        lambda text: tell(Noted(text)),
        recipe.deploy.sites,
        theirs,
    )
    if recipe.method.undecided:
        recipe = with_reported_ranks(recipe, nodes)
        folder.write_json(
            "config.json", recipe.model_dump(mode="json")
        )  # from here on it is a recipe that somebody could have written by hand
        ranks = method_of(recipe).capabilities.ranks
        said = [f"{name} rank {ranks.of(number)}" for number, name in enumerate(recipe.deploy.sites) if ranks]
        tell(Noted(f"by the sites' memory: {', '.join(said)}"))

    def carry(link: Link, workspace: Workspace) -> Exchanged:
        most, tells = enough(recipe), teller(link, workspace, where)
        link.bounds.most = lambda client, verb: heaviest(
            recipe, nodes.reports.get(recipe.deploy.sites[client], {}), verb
        )
        return Exchanged(
            server_store,
            nodes,
            signing,
            link,
            where.run,
            recipe.canonical(),
            recipe.deploy.sites,
            recipe.deploy.deadline,
            most,
            lambda asks: budget(link, workspace, asks),
            tells,
            allowed.speaks,
        )

    try:
        run(recipe, folder, tell, carry, at_coordinator(located(recipe, folder.origin())))
        server_store.release(where.run, recipe.rounds)
    except FedtuneError as error:
        if error.code in GIVEN_UP:
            server_store.let_in(where.run, anew=bool(build(recipe.chain).hides))
        raise
    finally:
        server_store.close()


def with_reported_ranks(recipe: Recipe, nodes: Nodes) -> Recipe:
    """Every site's LoRA rank, by the memory that it says is free for training. Waits for all sites. Raises
    F502."""
    sites, end = recipe.deploy.sites, time.monotonic() + recipe.deploy.deadline
    while lacking := [name for name in sites if name not in nodes.reports]:
        if time.monotonic() > end:
            raise FedtuneError(
                "F502",
                sentence=f"'{lacking[0]}' has not connected within {recipe.deploy.deadline:.0f} s, "
                "and its LoRA rank depends on its memory",
                do="start it, or set method.lora_rank_by_client in the recipe",
            )
        nodes.look()
        time.sleep(PAUSE)
    known, labels = {name: memory_of(nodes.reports[name]) for name in sites}, len(recipe.data.labels) or None
    made = decided(recipe, [known[name] for name in sites], labels, least=True)
    for name in (name for name, memory in known.items() if not fits(recipe, memory, labels)):
        nodes.tell(
            f"'{name}' says that it has {size(known[name])} of memory, in which nothing can be trained: it "
            "is given the least"
        )
    return made


def fits(recipe: Recipe, memory: int, labels: int | None) -> bool:
    """Whether anything can be trained in so much memory; what one site says of itself ends nobody's run."""
    try:
        decided(recipe, [memory], labels)
    except FedtuneError as error:
        if error.code != "M308":
            raise
        return False
    return True


def teller(link: Link, workspace: Workspace, where: Deployed) -> Callable[[Ask, str], dict[str, str]]:
    """What tickets say for a method whose model is split: the parts that are meant, and a token for the body
    of this round."""
    split = link.method.capabilities.split
    if split is None:
        return lambda ask, name: {}
    from fedtune.split.session import Tokens

    tokens, facts = Tokens(shared_key(Path(where.home) / SPLIT_KEY)), split.describe(workspace.tunable)
    return lambda ask, name: replace(
        facts, token=tokens.issue(where.run, ask.now.number, ask.client, name)
    ).to_words()


def enough(recipe: Recipe) -> Callable[[int], int]:
    """How many answers end a question: all that were asked, or as many as [sampling] says where more were
    asked."""
    aim = wanted(recipe.sampling, len(recipe.deploy.sites))
    return lambda asked: min(asked, aim) if recipe.deploy.over else asked


def budget(link: Link, workspace: Workspace, asks: Sequence[Ask]) -> int:
    """Most bytes of one answer: its numbers as float64, and room for a frame with names."""
    distinct = {ask.payload: ask for ask in asks}.values()
    schemas = (
        link.tasks[ask.verb].sent(asked_with(link.tasks[ask.verb], workspace.tunable, ask), ask.now)
        for ask in distinct
    )
    return max(8 * schema.count + 256 * len(schema.entries) for schema in schemas) + (1 << 16)


def judge_of(coordinator: Identity, sites: Sequence[str]) -> Judge:
    """Who signed a greeting's answer: a site of this run, with a key that may speak, about this greeting."""
    allowed = AllowList(coordinator.folder / ALLOWED)

    def judge(nonce: bytes, sealed: bytes) -> Site:
        signed = Signed.from_json(sealed)
        peer = signer(signed, coordinator.authority, utc_now(), "greeting")
        allowed.check(peer)
        said = read_report(signed.record)
        if said.get("nonce") != nonce.hex() or said.get("name") != peer.name.name:
            raise Refused(
                "W604",
                f"an answer to another greeting from '{peer.name.name}'",
                "one to this greeting",
                "nothing to do: it is greeted again",
            )
        if peer.name.name not in sites:
            raise FedtuneError(
                "F502",
                f"site '{peer.name.name}'",
                f"one of the run's: {', '.join(sites)[:200]}",
                "list it in deploy.sites of a new run",
            )
        report = said.get("report")
        return Site(peer.name.name, report if isinstance(report, dict) else {})

    return judge


def failed(folder: RunFolder) -> dict[str, Any] | None:
    """Why the run ended by itself, if it did."""
    try:
        return folder.read_json(FAILED)
    except FedtuneError:
        return None

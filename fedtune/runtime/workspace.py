"""One process's share of a federation: data and model once, whatever the number of clients."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedtune import selection, transforms
from fedtune.config import Recipe, method_of
from fedtune.data import Federation, Slice, load
from fedtune.data.settings import Source
from fedtune.errors import ClientFailed, FedtuneError
from fedtune.events import Event, Noted, Truncated
from fedtune.methods import Method
from fedtune.model.distil_settings import Public
from fedtune.privacy.vault import MemoryVault, Vault
from fedtune.rng import stream
from fedtune.runtime.checkpoints import ClientStates
from fedtune.runtime.client_half import state_after, state_before
from fedtune.runtime.masked_tasks import with_masks
from fedtune.runtime.paths import located
from fedtune.runtime.protocol import Ask, Link
from fedtune.runtime.rows_at import rows_at
from fedtune.runtime.site_scores import SCORE, score_task
from fedtune.runtime.task import tasks_of
from fedtune.types import Client

if TYPE_CHECKING:
    from fedtune.model.base import Base
    from fedtune.model.encode import Encoded
    from fedtune.model.frozen_front import FrozenFront
    from fedtune.model.objectives import Preference
    from fedtune.model.token_cache import TokenCache
    from fedtune.model.tunable import TunableModel

EMULATOR = "emulator.safetensors"  # in a run's folder: what was distilled of an emulator


@dataclass
class Workspace:
    """Slices of data, the shared base with the method's tensors, and the clients' states."""

    recipe: Recipe
    federation: Federation
    base: Base
    tunable: TunableModel
    client_states: ClientStates
    tell: Callable[[Event], None]
    alive: Callable[[], None] = lambda: None  # called while rows are encoded
    body: Any = None  # the way to a body service, for methods that split the model; None: in this process
    tokens: TokenCache | None = None  # rows as tokens, from one start to the next
    vaults: dict[int, Vault] = field(default_factory=dict)  # the clients' secrets, for as long as a round
    _encoded: dict[str, Any] = field(default_factory=dict)
    _fronts: dict[str, Any] = field(default_factory=dict)
    _nothing: dict[int, ClientFailed] = field(default_factory=dict)  # clients that no row is left

    @property
    def names(self) -> dict[int, str]:
        return {slice_.id: slice_.name for slice_ in self.federation.clients}

    @property
    def present(self) -> tuple[int, ...]:
        """Numbers of the clients that may take part: all but those of sampling.without."""
        return tuple(n for n, name in self.names.items() if name not in self.recipe.sampling.without)

    def client(self, ask: Ask) -> Client:
        """A client at work: the shared tunable model, its own data, and its state as the server counts
        it."""
        return self.client_with(ask.client, state_before(self.client_states.of(ask.client), ask))

    def client_with(self, number: int, client_state: dict[str, np.ndarray]) -> Client:
        return Client(
            number,
            self.names[number],
            self.tunable.at_clients,
            self.train(number),
            client_state,
            self.body,
            held_out=lambda: self.held_out(number),
            vault=self.vaults.setdefault(number, MemoryVault()),
        )

    def done(self, ask: Ask, client: Client) -> None:
        """Keep the client's state after an answer."""
        self.client_states.held[ask.client] = state_after(
            self.client_states.of(ask.client), ask, client.state
        )

    def train(self, number: int) -> Encoded:
        """Raises ClientFailed D209 where [[select]] leaves a client nothing."""
        slice_ = self.federation.clients[number]
        key = f"train:{number}"
        rows = slice_.train if key in self._encoded else self.selected(slice_)
        encoded = self.encode(key, rows, f"client {slice_.name}")
        if self.tunable.at_clients.keeps_front:
            from fedtune.model.kept_front import reserve

            reserve(self.tunable.at_clients, encoded)  # before anybody forks
        return encoded

    def selected(self, slice_: Slice) -> list[dict[str, Any]]:
        """The rows that [[select]] makes of a client's, by the base model as it was before any tuning."""
        if slice_.id in self._nothing:
            raise self._nothing[slice_.id]
        select = self.recipe.select
        if not select or not slice_.train:
            return slice_.train
        from fedtune.model.likelihood import base_alone

        with (
            base_alone(self.tunable.at_clients) if any(one.reads for one in select) else nullcontext() as base
        ):
            how = {**how_to_encode(self.recipe.data), "alive": self.alive}
            whose = selection.Holder(slice_.id, self.recipe.seed, base, how)
            try:
                return selection.selected(
                    select,
                    slice_.train,
                    whose,
                    lambda said: self.tell(Noted(f"client {slice_.name}: {said}")),
                )
            except ClientFailed as error:
                self._nothing[slice_.id] = error
                raise

    def encode_all(self) -> None:
        """Every client's training rows and the test set: what is wrong with a text shows before the first
        round, on every engine. A client whom [[select]] leaves nothing is left out when it is asked."""
        for slice_ in self.federation.clients:
            if slice_.train:  # of a real site, nobody but itself has rows
                with suppress(ClientFailed):
                    self.train(slice_.id)
        if self.federation.test:
            self.test()

    def held_out(self, number: int) -> Encoded:
        slice_ = self.federation.clients[number]
        return self.encode(f"test:{number}", slice_.test, f"client {slice_.name} (held out)", scored=True)

    def test(self) -> Encoded:
        return self.encode("test", self.federation.test, "the test set", scored=True)

    def choosing(self) -> tuple[str, Encoded]:
        """The rows on which rounds are compared, and whose they are: those that clients hold out, which the
        test set shares with nobody; else the test set's own."""
        own = [row for slice_ in self.federation.clients for row in slice_.test]
        name = "held-out rows" if own and len(own) != len(self.federation.test) else "test rows"
        rows = own if name == "held-out rows" else self.federation.test
        most = self.recipe.evaluate.rows
        if 0 < most < len(rows):
            drawn = stream("rows that choose", self.recipe.seed).permutation(len(rows))[:most]
            rows = [rows[number] for number in sorted(drawn.tolist())]
        return name, self.encode(name, rows, f"the {name}", scored=True)

    def front(self, name: str = "test") -> FrozenFront:
        """What the model's frozen blocks say of a set of rows that is scored many times."""
        from fedtune.model.frozen_front import FrozenFront

        front: FrozenFront = self._fronts.setdefault(name, FrozenFront())
        return front

    def pooled(self) -> Encoded:
        """All clients' training rows in one place: what a federation exists to avoid, for comparison only."""
        if "pooled" not in self._encoded:
            from fedtune.model.encode import joined

            parts = [self.train(number) for number in self.present if number not in self._nothing]
            whole = joined(parts, self.base)
            if any(one.orders for one in self.recipe.select):  # what comes first at its client comes first
                early = [place / len(part) for part in parts for place in range(len(part))]
                whole = whole.some(sorted(range(len(early)), key=early.__getitem__))
            self._encoded["pooled"] = whole
        pooled: Encoded = self._encoded["pooled"]
        return pooled

    def encode(self, key: str, rows: list[dict[str, Any]], whose: str, scored: bool = False) -> Encoded:
        """Rows as the model reads them, once for each key."""
        if key not in self._encoded:
            from fedtune.model.encode import encode

            data = self.recipe.data
            how = how_to_encode(data, scored)
            encoded = (
                self.tokens.encoded(rows, self.base, how, self.alive)
                if self.tokens
                else encode(rows, self.base, **how, alive=self.alive)
            )
            for name, count in encoded.unshown.items():
                self.tell(
                    Noted(
                        f"{whose}: {count} of {len(rows)} rows have messages with '{name}', which the "
                        "model's chat template does not show"
                    )
                )
            if encoded.truncated or encoded.dropped:
                self.tell(Truncated(whose, len(rows), encoded.truncated, encoded.dropped, data.max_length))
            self._encoded[key] = encoded
        result: Encoded = self._encoded[key]
        return result


def how_to_encode(data: Source, scored: bool = False) -> dict[str, Any]:
    """What [data] says to `encode`; rows that are scored do not overlap."""
    same = {
        name: getattr(data, name) for name in ("max_length", "separator", "overlong", "template", "system")
    }
    return same | {"stride": 0 if scored else data.stride, "day": data.date}


def judge_of(recipe: Recipe) -> Preference | None:
    """The loss by which a recipe's pairs of responses are scored; None for other tasks."""
    from fedtune.model.objectives import Preference

    objective = recipe.method.objective
    return objective if isinstance(objective, Preference) else None


def public_for(recipe: Recipe, base: Base, folder: Path | None) -> Public | None:
    """What a base's owner distils with, by a recipe whose paths are located, and where it is kept in a run's
    folder; None where nothing is distilled."""
    path = recipe.method.public

    def rows() -> Encoded:
        from fedtune.model.encode import encode

        found, _ = rows_at(recipe.data, path, base.labels, recipe.seed, "the public rows")
        encoded = encode(found, base, **how_to_encode(recipe.data))
        if not len(encoded):
            do = "correct method.distil.data"
            raise FedtuneError("D202", f"no public rows in '{path}'", "at least one", do)
        return encoded

    return Public(rows, folder / EMULATOR if folder else None) if path else None


def build_workspace(
    recipe: Recipe,
    method: Method,
    client_states: ClientStates,
    tell: Callable[[Event], None],
    federation: Federation | None = None,
    base_of: Callable[[Federation], Base] | None = None,
    place: Path | None = None,
    alive: Callable[[], None] = lambda: None,
    tokens: TokenCache | None = None,
    folder: Path | None = None,
) -> Workspace:
    """Load data (the recipe's, unless a federation is given), then the model: mistakes in the data show
    before the model's seconds are spent.

    base_of  loads the base, where a site does not hold the whole of it
    place    where the recipe's relative paths are meant from; None: from the working directory
    alive    called while rows are encoded, now and later
    tokens   where rows are kept as tokens; None: the user's own cache, where the recipe allows it
    folder   the run's, where a distilled emulator lies from one start to the next
    """
    here = located(recipe, place)
    if federation is None and here.data.begin():
        importlib.import_module("fedtune.model.fit")  # torch and transformers, which take as long as the data
    federation = federation or load(here.data, recipe.partition, recipe.seed)
    federation = federation.without(recipe.sampling.without)
    for note in recipe.notes:
        tell(Noted(note))
    for reason, count in federation.dropped.items():
        tell(Noted(f"{count} rows left out: {reason}"))
    for note in federation.notes:
        tell(Noted(note))
    from fedtune.model.base import load as load_base

    base = (
        base_of(federation)
        if base_of
        else load_base(here.model, recipe.data.task, federation.labels, recipe.seed)
    )
    base.name = recipe.model.name  # what exports call it
    base.judge = judge_of(recipe)
    base.public = public_for(here, base, folder)
    from fedtune.model.encode import check_length

    check_length(base, recipe.data.max_length)
    recipe.method.require(base)
    for note in base.notes:
        tell(Noted(note))
    from fedtune.model.token_cache import TokenCache

    kept = (tokens or TokenCache.of_user()) if recipe.data.cache else None
    tunable = method.prepare(base, recipe.seed)
    if error := tunable.distilled:
        tell(Noted(f"emulator distilled: its error went from {error['before']:.4g} to {error['after']:.4g}"))
    return Workspace(recipe, federation, base, tunable, client_states, tell, alive, tokens=kept)


def workspace_of(recipe: Recipe, place: Path | None = None) -> Workspace:
    """A workspace to look at outside of any run: nothing is remembered, nothing is told."""
    return build_workspace(
        recipe, method_of(located(recipe, place)), ClientStates(None), lambda event: None, place=place
    )


def verbs_of(recipe: Recipe) -> set[str]:
    """Everything that a client can be asked in a run of this recipe."""
    method, chain = method_of(recipe), transforms.build(recipe.chain)
    score = score_task(method, recipe.evaluate.batch, chain, "")
    return {*with_masks({**tasks_of(method, chain, ""), SCORE: score}, "")}


def link_of(workspace: Workspace, method: Method, agreed: Recipe | None = None) -> Link:
    """What server and clients agree on. A run's identity is its recipe: the same recipe, the same bytes,
    messages included, wherever it runs.

    agreed  the coordinator's recipe, where this workspace was built from a site's own version of it
    """
    recipe = agreed or workspace.recipe
    run, chain = recipe.fingerprint[:16], transforms.build(recipe.chain)
    more = {SCORE: score_task(method, recipe.evaluate.batch, chain, run)}
    from fedtune.model.sparse_support import base_print

    return Link(
        run,
        base_print(workspace.tunable.at_clients.base),
        method,
        chain,
        recipe.downlink,
        recipe.limits,
        more,
    )

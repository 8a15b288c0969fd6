"""FedPEFT: every client trains a small adapter on the frozen model, the server averages what the clients hold.

Sun et al. 2022, "Conquering the Communication Constraints to Enable Large Pre-Trained Models in Federated Learning"
(arXiv:2210.01708). Up and down per client and round: the adapter and the task head, once each.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from fedtune.model.settings import AdapterSettings, OuterSettings, TrainSettings
from fedtune.rng import seed_of
from fedtune.schema import Schema
from fedtune.settings import Settings
from fedtune.types import Client, Cohort, Round, State, Tensors, Update, Verb

if TYPE_CHECKING:
    from fedtune.model.base import Base
    from fedtune.model.bench import Bench


class FedPEFTSettings(Settings):
    """[method] type = "fedpeft"."""

    type: Literal["fedpeft"] = "fedpeft"
    weight: Literal["examples", "tokens", "equal"] = "examples"
    """What a client's answer counts for in the mean."""
    adapter: AdapterSettings = AdapterSettings()
    train: TrainSettings = TrainSettings()
    server: OuterSettings = OuterSettings()


class FedPEFT:
    """State: the adapter's tensors (shared with clients) and the server optimiser's moments (kept)."""

    type = "fedpeft"
    reads_each: frozenset[str] = frozenset()
    moves = frozenset({"train"})

    def __init__(self, settings: FedPEFTSettings, rounds: int) -> None:
        self.settings, self.rounds = settings, rounds

    def prepare(self, base: Base, seed: int) -> Bench:
        from fedtune.model.bench import attach

        return attach(base, self.settings.adapter, seed_of("adapter", seed))

    # --- on the server ------------------------------------------------------------------------------------------

    def start(self, bench: Bench) -> State:
        return State(bench.read())

    def round(self, state: State, cohort: Cohort, now: Round) -> State:
        mean = cohort.sum("train", state.shared).values()
        if self.settings.server.optimizer == "none":
            return State(mean, state.kept)
        from fedtune.model.outer import outer_step

        return State(*outer_step(state.shared, mean, state.kept, self.settings.server))

    def install(self, state: State, bench: Bench) -> None:
        bench.write(state.shared)

    def given(self, verb: str, bench: Bench) -> Schema:
        return Schema.of(bench.named)

    def answer(self, verb: str, given: Schema) -> Schema:
        return given

    # --- on each client -----------------------------------------------------------------------------------------

    @property
    def verbs(self) -> Mapping[str, Verb]:
        return {"train": self.train}

    def train(self, client: Client, given: Tensors, now: Round) -> Update:
        from fedtune.model.fit import fit

        bench: Bench = client.model
        bench.write(given)
        seed = seed_of("train", now.seed, now.number, client.id)
        report = fit(bench, client.data, self.settings.train, seed, progress=(now.number - 1, self.rounds))
        weight = {"examples": float(len(client.data)), "tokens": float(client.data.tokens), "equal": 1.0}[self.settings.weight]
        return Update.of(bench.read(), weight, {"loss": report.loss})

"""FedKSeed: every parameter is tuned, and what travels is a few whole numbers: how far along which of K known
directions.

Qin et al. 2024, "Federated Full-Parameter Tuning of Billion-Sized Language Models with Communication Cost
under 18 Kilobytes"
(ICML, arXiv:2312.06353). Down: K accumulators A_k. Up: one scalar a step (their seeds follow from the run's
seed, the round and the client),
or K sums of scalars, which can be added without being read. A model is always w = w0 + scale * sum_k A_k z_k,
rebuilt from the first values.

A client that can afford gradients trains as usual and sends the coordinates of its update along the same
directions: the same message, the same
replay, in the same round. There is no weight decay: it would make a model depend on more than the
accumulators.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedtune.aggregate import Rule
from fedtune.errors import FedtuneError, Refused
from fedtune.extras import require
from fedtune.methods import integers
from fedtune.methods.fedkseed_costs import FedKSeedCosts
from fedtune.methods.fedkseed_gradient import projected, takes_gradients
from fedtune.methods.fedkseed_settings import FedKSeedSettings
from fedtune.methods.fedkseed_walk import Walk, first_loss, require_converging, walked
from fedtune.methods.fedkseed_ways import way_of
from fedtune.methods.head_start import (
    MARK,
    features_verbs,
    head_of,
    joined,
    joined_shape,
    kept_until_started,
    set_first_head,
    starts,
)
from fedtune.methods.interface import Capabilities, Facts, Verb
from fedtune.methods.one_client import begin_alone
from fedtune.methods.seeds import pool_name, pools_of, save_seeds, seeds_of, start_of
from fedtune.methods.weights import TELLS, weight_of
from fedtune.model.rates import WIDTH
from fedtune.model.settings import whole_run
from fedtune.rng import seed_of
from fedtune.schema import Schema
from fedtune.types import Client, Cohort, Round, State, Sums, Tensors, Update

if TYPE_CHECKING:
    from fedtune.model.base import Base
    from fedtune.model.encode import Encoded
    from fedtune.model.tunable import TunableModel
    from fedtune.zeroth import Pool

HEAD = "head"  # its first values, float32 in the bits of whole numbers, which are sent once and then held
REACH = 1 << 26  # largest number of a gradient client; in practice they stay below 2**20


class FedKSeed:
    """State: the accumulators of every pool so far and their fingerprint (shared); the digest of the first
    values, the first loss
    and, for FedKSeed-Pro, sizes and visits of the seeds (kept)."""

    def __init__(self, settings: FedKSeedSettings, rounds: int) -> None:
        self.settings, self.rounds = settings.with_rates(WIDTH), rounds
        self.scale = integers.Scale.of(settings.clip, settings.bits)
        self.most = settings.steps * self.scale.top if settings.walks_only else REACH

    def prepare(self, base: Base, seed: int) -> TunableModel:
        from fedtune.model.initial_values import keep_origin
        from fedtune.model.kept_front import attach_tried

        require("numba", "zeroth", "method.type = 'fedkseed'")  # now, and not at each client
        tunable = attach_tried(base, self.settings.trained, seed_of("adapter", seed))
        keep_origin(tunable, seed)
        return tunable

    # --- on the server ---

    def start(self, tunable: TunableModel) -> State:
        kept: dict[str, np.ndarray] = {
            "start": np.frombuffer(start_of(tunable), np.uint8)
        } | kept_until_started(self.settings.head_start, tunable)
        if self.settings.importance:
            kept |= {
                "amplitudes": np.zeros(self.settings.size, np.int64),
                "visits": np.zeros(self.settings.size, np.int64),
            }
        return self.state(
            {} if self.settings.refresh else {pool_name(0): np.zeros(self.settings.size, np.int32)}, kept
        )

    def begin(self, state: State, cohort: Sums) -> State:
        """The state with the head started, where it has yet to be."""
        head = head_of(self.settings.head_start, state.kept, cohort)
        if not head:
            return state
        kept = {key: value for key, value in state.kept.items() if not key.startswith(MARK)}
        return self.state(pools_of(state.shared), kept | {HEAD: joined(head)})

    def round(self, state: State, cohort: Cohort, now: Round) -> State:
        state = self.begin(state, cohort)
        name = pool_name(self.epoch(now.number))
        pools = pools_of(state.shared)
        kept = {key: value.copy() for key, value in state.kept.items()}  # `gather` counts in place
        if self.settings.sends_steps:
            total, answer = self.gather(cohort, state, kept, now)
        else:
            answer = cohort.sum("train", state.shared)
            total = answer.tensors["pool"]
        before = pools.get(name, np.zeros(self.settings.size, np.int64)).astype(np.int64)
        pools[name] = integers.narrow(before + integers.mean(total, int(answer.weight)))
        self.check_loss(cohort, kept, now)
        return self.state(pools, kept)

    def gather(
        self, cohort: Cohort, state: State, kept: dict[str, np.ndarray], now: Round
    ) -> tuple[np.ndarray, Update]:
        """Every client's scalars, added to the seeds that its steps drew: (K,) sums, and weights and figures
        of all."""
        total, answers = np.zeros(self.settings.size, np.int64), Update({}, 0.0)
        for client, update in cohort.each("train", state.shared):
            weight = int(update.weight)
            sent = integers.unpacked(
                update.tensors["steps"] // weight, self.settings.bits, self.settings.steps
            )
            seeds = self.draw(state.shared, now, client)
            np.add.at(total, seeds, sent * weight)
            if self.settings.importance:
                np.add.at(kept["amplitudes"], seeds, np.abs(sent))
                np.add.at(kept["visits"], seeds, 1)
            answers += Update({}, update.weight, update.metrics)
        return total, answers

    def check_loss(self, cohort: Cohort, kept: dict[str, np.ndarray], now: Round) -> None:
        """Note the first loss; raise R408 where this round's is far above it, for the median client: a single
        one ends nobody's run."""
        loss = cohort.typical("loss")
        kept.setdefault("first", np.asarray(cohort.typical("start")))
        require_converging(loss, float(kept["first"]), now.number, self.settings)

    def state(self, pools: Mapping[str, np.ndarray], kept: Mapping[str, np.ndarray]) -> State:
        """Pools, with their fingerprint and, for FedKSeed-Pro, the importance of the seeds (four to a
        number)."""
        head = {HEAD: kept[HEAD].view(np.uint32)} if HEAD in kept else {}
        mark = integers.fingerprint(kept["start"].tobytes(), self.origin(head), pools)
        levels = (
            {"importance": integers.importance(kept["amplitudes"], kept["visits"]).view(np.uint32)}
            if self.settings.importance
            else {}
        )
        return State({**pools, **levels, **head, "fingerprint": mark.view(np.uint32)}, dict(kept))

    def origin(self, given: Tensors) -> dict[str, Any]:
        """What a model follows from, beside its first values and the accumulators; `given` may hold the head
        that started from the data."""
        s = self.settings
        always = {
            "pool": s.pool,
            "directions": s.directions,
            "size": s.size,
            "refresh": s.refresh,
            "unit": self.scale.unit,
            "lr": float(s.lr),
        }
        head = {"head": hashlib.sha256(given[HEAD].tobytes()).hexdigest()} if HEAD in given else {}
        return always | ({"curvature": True} if s.curvature else {}) | head

    def epoch(self, number: int) -> int:
        """Which pool a round uses; the first is 0."""
        return (number - 1) // self.settings.refresh if self.settings.refresh else 0

    def given(self, tunable: TunableModel, client: int, now: Round) -> Schema:
        finished = -(-(now.number - 1) // self.settings.refresh) if self.settings.refresh else 1
        pools = [(pool_name(epoch), (self.settings.size,)) for epoch in range(finished)]
        levels = [("importance", (self.settings.size // 4,))] if self.settings.importance else []
        start = self.settings.head_start
        head = [(HEAD, joined_shape(start, tunable))] if starts(start, tunable.head) else []
        return Schema((("fingerprint", (8,)), *head, *levels, *pools))

    def answer(self, given: Schema, now: Round) -> Schema:
        if not self.settings.sends_steps:
            return Schema(
                (("pool", (self.settings.size,)),),
                (("pool", "int16" if self.most < 1 << 15 else "int32", self.most),),
            )
        if self.settings.bits == 1:
            return Schema((("steps", (-(-self.settings.steps // 8),)),), (("steps", "uint8", 255),))
        return Schema((("steps", (self.settings.steps,)),), (("steps", "int16", self.scale.top),))

    def install(self, state: State, tunable: TunableModel) -> None:
        self.rebuild(tunable, state.shared)

    # --- on each client ---

    @property
    def verbs(self) -> Mapping[str, Verb]:
        s = self.settings
        train = Verb(self.train, self.given, self.answer, reads_each=s.sends_steps, holds=s.hold, whole=True)
        return {"train": train} | features_verbs(self.settings.head_start)

    def train(self, client: Client, given: Tensors, now: Round) -> Update:
        tunable: TunableModel = client.model
        if not self.belongs(given, tunable):
            found, expected = (
                "accumulators of other initial values, another pool or another scale",
                "those that belong to this client's base model, adapter and recipe",
            )
            raise Refused(
                "W604", found, expected, "use the same recipe, base model and release of torch on both sides"
            )
        self.rebuild(tunable, given)
        seed = seed_of("train", now.seed, now.number, client.id)
        # the server compares all rounds with the first
        start = first_loss(tunable, client.data, self.settings, seed) if now.number == 1 else None
        gradient = takes_gradients(self.settings, client.id, tunable, client.data)
        turn = (now.number - 1, self.rounds)
        epoch = self.epoch(now.number)
        if gradient:
            pool, s = self.pool(tunable, epoch), self.settings
            again = self.replayed(tunable, given)
            found_out = projected(
                tunable, client.data, pool, seed, s, self.scale.unit, self.most, turn, again
            )
        else:
            seeds, by = self.draw(given, now, client.id), self.curvature(tunable, given, now)
            held = pools_of(given).get(pool_name(epoch))
            found_out = self.walk(tunable, client.data, epoch, seeds, seed, by, turn, held)
        weight = int(weight_of(self.settings.weight, client, found_out.loss))
        if self.settings.sends_steps:
            tensors = {"steps": integers.packed(found_out.scalars, self.settings.bits)}
        else:
            tensors = {
                "pool": found_out.scalars
                if gradient
                else np.bincount(seeds, found_out.scalars, self.settings.size).astype(np.int64)
            }
        figures = {
            "loss": found_out.loss,
            "start": found_out.start if start is None else start,
            "gradient": float(gradient),
            "clipped": found_out.clipped,
        }
        return Update(
            {name: value * weight for name, value in tensors.items()},
            float(weight),
            {name: f * weight for name, f in figures.items()},
        )

    def draw(self, given: Tensors, now: Round, client: int) -> np.ndarray:
        """The seeds of a client's steps in this round: (steps,)."""
        levels = given["importance"].view(np.uint8) if self.settings.importance else None
        return integers.draw(self.settings.size, self.settings.steps, (now.seed, now.number, client), levels)

    def walk(
        self,
        tunable: TunableModel,
        data: Encoded,
        epoch: int,
        seeds: np.ndarray,
        seed: int,
        by: Mapping[str, Any] | None = None,
        turn: tuple[int, int] = (0, 1),
        held: np.ndarray | None = None,
    ) -> Walk:
        """Steps by forward passes alone along these seeds (steps,) from where the pool's accumulators are
        `held` (none: 0); `by` is the curvature's factor of each parameter; further as for `walked`."""
        way = way_of(tunable, self.pool(tunable, epoch), self.settings, self.scale, by, held)
        return walked(tunable, data, way, seeds, seed, self.settings, self.scale, turn)

    def belongs(self, given: Tensors, tunable: TunableModel) -> bool:
        """Whether accumulators were made for the values that this tunable model starts from, and for these
        settings."""
        about, pools = self.origin(given), pools_of(given)
        return any(
            np.array_equal(
                given["fingerprint"],
                integers.fingerprint(start_of(tunable, typed), about, pools).view(np.uint32),
            )
            for typed in (False, True)
        )

    def rebuild(self, tunable: TunableModel, given: Tensors) -> None:
        """The model that the accumulators mean, from the first values: one pass over the weights, whatever it
        held before."""
        if HEAD in given:
            set_first_head(tunable, given[HEAD])
        self.replayed(tunable, given)(tunable.named)

    def replayed(self, tunable: TunableModel, given: Tensors) -> Callable[[Mapping[str, Any]], None]:
        """Writes what the accumulators mean into all of the model's tensors, or into some under their
        names."""
        from fedtune.zeroth import Layout, replay

        return partial(
            replay,
            sums=self.sums(tunable, given),
            scale=self.replay_scale,
            base=tunable.origin.tensors,
            layout=Layout.of(tunable.named),
            bent=self.settings.curvature,
        )

    def sums(self, tunable: TunableModel, given: Tensors) -> list[tuple[Pool, np.ndarray]]:
        """Pools and their accumulators, the oldest first."""
        return [
            (self.pool(tunable, int(name.removeprefix("pool-"))), value)
            for name, value in sorted(pools_of(given).items())
        ]

    def curvature(self, tunable: TunableModel, given: Tensors, now: Round) -> Mapping[str, Any] | None:
        """What this round's steps are multiplied by, from the pools before its own; None: nothing."""
        from fedtune.zeroth import curvature, views

        now_in = pool_name(self.epoch(now.number))
        before = (
            self.sums(tunable, {name: value for name, value in given.items() if name < now_in})
            if self.settings.curvature
            else []
        )
        return views(curvature(tunable.named, before)) if before else None

    def pool(self, tunable: TunableModel, epoch: int) -> Pool:
        from fedtune.zeroth import Pool

        s = self.settings
        return Pool(seed_of("pool", tunable.origin.seed, epoch), s.size, s.pool, s.directions)

    @property
    def replay_scale(self) -> float:
        """What 1 of an accumulator moves a weight by."""
        return self.scale.replay(float(self.settings.lr))

    # --- around a run ---

    @property
    def facts(self) -> Facts:
        s = self.settings
        title = (
            f"fedkseed / {s.adapter.kind if s.space == 'adapter' else 'full' if not s.only else 'part'}, "
            f"{s.pool} pool of {s.size}"
        )
        forms = ("seeds", "merged", "adapter") if s.space == "adapter" else ("seeds", "merged")
        return Facts("fedkseed", title, forms, ("clipped", "gradient", "loss", "start"), TELLS[s.weight])

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(costs=FedKSeedCosts(self.settings), begin=self.begin, verify=self.verify)

    def verify(self, state: State, tunable: TunableModel) -> None:
        """Refuse to install a state on another start. Raises M304."""
        if not self.belongs(state.shared, tunable):
            found, expected = (
                "seeds made for other initial values",
                "the initial values of this base model and adapter",
            )
            raise FedtuneError(
                "M304",
                found,
                expected,
                "use the base model and the releases of torch and peft that the seeds were made with",
            )

    def alone(self, tunable: TunableModel, data: Encoded, state: State, seed: int) -> None:
        begin_alone(self, tunable, data, state, seed)
        if self.settings.walks_only:
            steps = self.settings.steps * self.rounds
            self.walk(tunable, data, 0, integers.draw(self.settings.size, steps, (seed, 0, 0)), seed)
            return
        from fedtune.model.fit import fit

        fit(tunable, data, whole_run(self.settings.train, self.rounds), seed, progress=(0, 1))

    def export(
        self, form: str, state: State, tunable: TunableModel, folder: Path, card: str, seed: int
    ) -> None:
        from fedtune.model.export import save

        if form != "seeds":
            save(form, tunable, folder, card)
            return
        method = self.settings.model_dump(mode="json")
        save_seeds(folder, seeds_of(tunable.base, seed, self.rounds, method, state.shared), card)


class FedKSeedTable(FedKSeedSettings):
    """[method] type = "fedkseed"."""

    def build(self, rounds: int, rule: Rule) -> FedKSeed:
        return FedKSeed(self, rounds)  # the mean is the only rule that `conflicts` lets through

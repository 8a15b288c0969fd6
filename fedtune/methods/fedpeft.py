"""FedPEFT: every client trains a small adapter on the frozen model, the server makes one of what the clients
hold.

Sun et al. 2022, "Conquering the Communication Constraints to Enable Large Pre-Trained Models in Federated
Learning"
(arXiv:2210.01708). Up and down per client and round: the adapter and the task head, once each; the rule in
[aggregate]
says how answers become one adapter, and may leave parts of it at home.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fedtune.aggregate import (
    ClientAdapter,
    Combined,
    Mean,
    Rule,
    TooFew,
    as_adapter,
    flat_residual,
    left_out,
    residual_of,
)
from fedtune.errors import ClientFailed, FedtuneError
from fedtune.methods.base import AdapterMethod, figures, names_of_figures, shown
from fedtune.methods.fedpeft_ranks import FedPEFTCosts, RanksByClient, at_rank, decided, explained
from fedtune.methods.fedpeft_settings import FedPEFTSettings
from fedtune.methods.fedpeft_state import (
    OWN,
    apart,
    carried,
    core_of,
    own_of,
    padded,
    with_core,
    without_core,
)
from fedtune.methods.head_start import features_verbs, kept_until_started, started
from fedtune.methods.interface import Capabilities, Facts, Verb
from fedtune.methods.lift_stages import check_print, print_entries, told_print, without_print
from fedtune.methods.lora_inputs import begun, kept_until_begun, moments_verbs
from fedtune.methods.lora_start import residual_rank, started_pairs
from fedtune.methods.weights import TELLS, weight_of
from fedtune.model.adapters import Lora
from fedtune.rng import seed_of
from fedtune.schema import Schema
from fedtune.types import Client, Cohort, Round, State, Sums, Tensors, Update

if TYPE_CHECKING:
    from fedtune.model.adapters import Adapter
    from fedtune.model.base import Base
    from fedtune.model.encode import Encoded
    from fedtune.model.fit import FitReport
    from fedtune.model.memory_plan import Plan
    from fedtune.model.tunable import TunableModel


class FedPEFT(AdapterMethod):
    """State: the adapter's tensors and, for rules that carry one and starts that need one, a residual of
    extra rank (shared with clients); the server optimiser's moments (kept)."""

    settings: FedPEFTSettings

    def __init__(self, settings: FedPEFTSettings, rounds: int, rule: Rule | None = None) -> None:
        if settings.lora_rank_by_client == "auto":
            found = "method.lora_rank_by_client = 'auto' where the ranks should be known"
            raise FedtuneError(
                "C104",
                found,
                "a list of ranks",
                "start the run with fedtune simulate or fedtune server, which choose them",
            )
        self.settings, self.rounds, self.rule = settings, rounds, rule or Mean()
        self.client_ranks = settings.lora_rank_by_client
        self.fixed = residual_rank(settings)  # of a residual that no round changes
        self.extra = self.rule.residual_rank + self.fixed
        self.started: TunableModel | None = None  # whose weights a start may take something out of

    def attached(self, base: Base, adapter: Adapter, seed: int) -> TunableModel:
        """An adapter on a base, of which only that is trained which the rule trains in some round."""
        from fedtune.model.lora_ranks import freeze

        tunable = super().attached(base, adapter, seed)
        freeze(tunable, tunable.named.keys() - self.ever(tunable.named))
        return tunable

    # --- who holds what

    def ever(self, names: Mapping[str, Any]) -> frozenset[str]:
        """What is trained in some round; the rest stays as the seed made it and never travels."""
        return self.by_rule(names, 1) | self.by_rule(names, 2)

    def by_rule(self, names: Mapping[str, Any], number: int) -> frozenset[str]:
        return frozenset(names) if self.rule.core and number == 1 else self.rule.trains(names, number)

    def trains(self, names: Mapping[str, Any], number: int) -> frozenset[str]:
        return self.by_rule(names, number) & self.settings.adapter.turn(names, number)

    def at_home(self, names: Mapping[str, Any], number: int) -> frozenset[str]:
        """What clients keep to themselves; in the last round they say it, so that there is one adapter at the
        end."""
        return frozenset() if number == self.rounds else self.rule.stays(names)

    def seat(self, client: int | None = None) -> tuple[int, float]:
        """Rank and scale of a client's pairs; None: the server's. Kinds without pairs have rank 0."""
        s, a = self.settings, self.settings.adapter
        if not isinstance(a, Lora):
            return 0, 1.0
        ranks, alphas = self.client_ranks, s.lora_alpha_by_client
        rank = ranks[client % len(ranks)] if ranks and client is not None else a.rank
        root = math.sqrt if a.rslora else float
        if alphas and client is not None:
            return rank, alphas[client % len(alphas)] / root(rank)
        return rank, a.alpha / root(a.rank)

    # --- on the server

    def start(self, tunable: TunableModel) -> State:
        self.started = tunable
        if self.settings.start_from:
            from fedtune.model.start_from import start_from

            start_from(tunable, self.settings.start_from)
        tensors = tunable.read()
        own = self.rule.stays(tensors)
        shared = {name: value for name, value in tensors.items() if name not in own}
        shared |= {
            name: np.zeros(shape, np.float32) for name, shape in carried(Schema.of(tensors), self.extra)
        }
        shared |= started_pairs(self.settings.lora_start, tunable, *self.seat())
        return State(
            shared,
            {OWN + name: tensors[name] for name in sorted(own)}
            | kept_until_started(self.settings.starts_head, tunable, self.settings.head_noise)
            | kept_until_begun(self.settings.lora_start, tunable, self.seat()[0]),
        )

    def round(self, state: State, cohort: Cohort, now: Round) -> State:
        return self.trained(self.begin(state, cohort), cohort, now)

    def begin(self, state: State, cohort: Sums) -> State:
        s = self.settings
        return begun(started(s.starts_head, state, cohort), cohort, s.lora_start, self.started, self.seat())

    def trained(self, state: State, cohort: Cohort, now: Round) -> State:
        if self.rule.core and now.number == 1:  # plain LoRA, whose mean says where the fixed factors point
            return State(with_core(cohort.sum("train", state.shared).values(), self.seat()), state.kept)
        if not self.rule.linear:
            try:
                return State(self.combined(state, cohort, now), state.kept)
            except TooFew as error:
                cohort.skip(error)
                return state
        own = own_of(state)
        before = state.shared if now.number < self.rounds else {**state.shared, **own}
        mean = cohort.sum("train", {**before, **self.prints(before, now)}).values()
        if self.settings.server.optimizer != "none":
            from fedtune.model.server_step import outer_step

            adapter, residual = apart(state.shared)
            after, kept = outer_step(adapter, mean, state.kept, self.settings.server)
            return State(after | residual, kept)
        after = self.rule.from_mean(before, mean)
        own = {name: after.pop(name) if name in after else value for name, value in own.items()}
        return State(after, {OWN + name: value for name, value in own.items()})

    def prints(self, state: Tensors, now: Round) -> dict[str, np.ndarray]:
        """What clients compare with what they find, of an adapter with stages."""
        if self.started is None or not print_entries(self.settings.adapter):
            return {}
        self.write(self.started, state, self.seat())
        return told_print(self.started, now.number)

    def combined(self, state: State, cohort: Cohort, now: Round) -> dict[str, np.ndarray]:
        """The next shared tensors, from single answers; figures of the rule go with the round's."""
        adapter, residual = apart(state.shared)
        before = Combined(adapter, {} if self.fixed else residual_of(residual))
        _, scale = self.seat()
        given: dict[tuple[int, float], Tensors] = {self.seat(): state.shared}

        def give(client: int) -> Tensors:
            seat = self.seat(client)
            if seat not in given:
                mine = self.rule.for_rank(before.tensors, scale, *seat)
                cohort.note(f"given/rank {seat[0]}", left_out(before.tensors, scale, mine, seat[1]))
                given[seat] = {**mine, **residual}
            return given[seat]

        answers = (
            ClientAdapter(client, update.values(), update.weight, self.seat(client)[1])
            for client, update in cohort.each("train", give if self.settings.mixed else state.shared)
        )
        after = self.rule.combine(answers, before, scale, now)
        for name, number in (
            *after.report.items(),
            *((f"error/{module}", error) for module, error in after.layers.items()),
        ):
            cohort.note(name, number)
        beside = residual if self.fixed else padded(flat_residual(after.residual), self.extra)
        return {**after.tensors, **beside}

    def install(self, state: State, tunable: TunableModel) -> None:
        own = own_of(state)
        self.write(tunable, {**state.shared, **own}, self.seat())

    def write(self, tunable: TunableModel, tensors: Tensors, seat: tuple[int, float]) -> None:
        """Put an adapter of some rank, behind its residual, into the tunable model."""
        from fedtune.model.lora_ranks import resize, stack

        rank, scale = seat
        if self.settings.mixed or self.extra:
            resize(tunable, self.extra + rank, scale)
        tunable.write(stack(*apart(without_core(tensors)), scale))

    # --- schemas

    def given(self, tunable: TunableModel, client: int, now: Round) -> Schema:
        """What travels down: at the client's rank, whatever rank the tunable model has now."""
        names = self.ever(tunable.named) - self.at_home(tunable.named, now.number)
        rank, _ = self.seat(client)
        whole = Schema.of({name: value for name, value in tunable.named.items() if name in names})
        entries = (
            [(name, at_rank(name, shape, rank)) for name, shape in whole.entries]
            if self.settings.mixed or self.extra
            else list(whole.entries)
        )
        cores = (
            [(core_of(name), (rank, rank)) for name, _ in entries if name.endswith(".lora_A.weight")]
            if self.rule.core and now.number > 1
            else []
        )
        beside = [*carried(Schema(tuple(entries)), self.extra), *print_entries(self.settings.adapter)]
        return Schema(tuple(sorted([*entries, *cores, *beside])))

    def answer(self, given: Schema, now: Round) -> Schema:
        names = {name: None for name, _ in given.entries if ".residual_" not in name}
        sent = self.sent(names, now.number)
        return Schema(tuple(entry for entry in given.entries if entry[0] in sent))

    def sent(self, names: Mapping[str, Any], number: int) -> frozenset[str]:
        if self.rule.core and number == 1:
            return frozenset(names)
        home = self.rule.stays(names) if number == self.rounds else frozenset()
        return self.rule.sends(names, number) & self.settings.adapter.turn(names, number) | home

    # --- on each client

    @property
    def verbs(self) -> Mapping[str, Verb]:
        train = Verb(
            self.train,
            self.given,
            self.answer,
            reads_each=not self.rule.linear,
            moves=True,
            shows=shown(self.settings.train),
            together=(self.settings.train.together, self.train_together),
        )
        s = self.settings
        features = features_verbs(s.starts_head, noise=s.head_noise)
        return {"train": train} | features | moments_verbs(s.lora_start, self.seat()[0])

    def train(self, client: Client, given: Tensors, now: Round) -> Update:
        from fedtune.model.fit import fit
        from fedtune.model.lora_ranks import training_only, unstack, with_cores

        tunable: TunableModel = client.model
        own = self.kept_by(client)
        self.write(tunable, {**without_print(given), **own}, self.seat(client.id))
        check_print(tunable, given, now.number)
        seed = seed_of("train", now.seed, now.number, client.id)
        with with_cores(tunable, given):
            trained, sent = (what(tunable.named, now.number) for what in (self.trains, self.sent))
            with training_only(tunable, trained, self.extra):
                report = fit(
                    tunable, client.data, self.settings.train, seed, progress=(now.number - 1, self.rounds)
                )
                values = tunable.read()
        values = unstack(values, self.extra) if self.extra else values
        return self.update_of(client, values, list(own), sent, report)

    def kept_by(self, client: Client) -> dict[str, np.ndarray]:
        """What this client keeps to itself."""
        named = client.model.named
        return {
            name: client.state.get(OWN + name, np.zeros(tuple(named[name].shape), np.float32))
            for name in self.rule.stays(named)
        }

    def update_of(
        self, client: Client, values: Tensors, own: Sequence[str], sent: Collection[str], report: FitReport
    ) -> Update:
        client.state.update({OWN + name: values[name] for name in own})
        weight = weight_of(self.settings.weight, client, report.loss)
        return Update.of(
            {name: values[name] for name in sorted(sent)}, weight, figures(self.settings, report)
        )

    def train_together(
        self, clients: Sequence[Client], given: Sequence[Tensors], now: Round
    ) -> list[Update | ClientFailed]:
        """`train` of several clients in one pass over the base; none has a core, an extra or a rank of its
        own."""
        from fedtune.model.together import Trainee, fit_together

        tunable: TunableModel = clients[0].model
        homes = [self.kept_by(client) for client in clients]
        whole = [{**tensors, **own} for tensors, own in zip(given, homes, strict=True)]
        trainees = [
            Trainee(client.data, start, seed_of("train", now.seed, now.number, client.id))
            for client, start in zip(clients, whole, strict=True)
        ]
        trained, sent = (what(tunable.named, now.number) for what in (self.trains, self.sent))
        found = fit_together(
            tunable,
            trainees,
            self.settings.train,
            trained,
            progress=(now.number - 1, self.rounds),
        )
        return [
            one if isinstance(one, ClientFailed) else self.update_of(client, one[1], list(own), sent, one[0])
            for client, own, one in zip(clients, homes, found, strict=True)
        ]

    # --- around a run

    def alone(self, tunable: TunableModel, data: Encoded, state: State, seed: int) -> None:
        from fedtune.model.lora_ranks import training_only

        self.started = tunable
        self.install(state, tunable)  # at its rank, before anything is said of its slices
        with training_only(tunable, self.settings.adapter.turn(tunable.named, 1), self.fixed):
            super().alone(tunable, data, state, seed)

    @property
    def facts(self) -> Facts:
        return Facts(
            "fedpeft",
            f"fedpeft / {self.settings.adapter.kind}"
            + (f" / {self.rule.rule}" if self.rule.rule != "mean" else ""),
            metrics=names_of_figures(self.settings),
            weight=TELLS[self.settings.weight],
        )

    @property
    def capabilities(self) -> Capabilities:
        lora = isinstance(self.settings.adapter, Lora)
        ranks = RanksByClient(self.seat) if self.settings.mixed else None
        costs, shrink = FedPEFTCosts(self.settings, self.extra), self.shrink if lora else None
        return Capabilities(costs, ranks, shrink, begin=self.begin)

    def shrink(self, state: State, tunable: TunableModel, rank: int) -> float:
        """Put the best adapter of a rank into the tunable model, whatever the rule carries beside it; the
        share of its norm that this loses."""
        from fedtune.model.lora_ranks import resize, thaw

        _, scale = self.seat()
        own = own_of(state)
        thaw(tunable)
        tensors = {
            **{name: value for name, value in tunable.read().items() if name not in state.shared},
            **state.shared,
            **own,
        }
        whole = without_core(tensors)
        plain, residual = apart(whole)
        cut, _, lost = as_adapter(Combined(plain, residual_of(residual)), scale, rank, scale)
        resize(tunable, rank, scale)
        tunable.write({name: cut[name] for name in tunable.named})
        return lost


class FedPEFTTable(FedPEFTSettings):
    """[method] type = "fedpeft"."""

    def build(self, rounds: int, rule: Rule) -> FedPEFT:
        return FedPEFT(self, rounds, rule)

    def decided(
        self, recipe: Any, memory: Sequence[int] = (), labels: int | None = None, least: bool = False
    ) -> FedPEFTSettings:
        return decided(self, recipe, memory, labels, least) if self.undecided else self

    def explain(self, recipe: Any, names: Sequence[str], plan: Plan) -> tuple[FedPEFTSettings, list[str]]:
        return explained(self, recipe, names, plan) if self.lora_rank_by_client else (self, [])

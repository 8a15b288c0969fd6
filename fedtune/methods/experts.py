"""LoRA experts: a general adapter of everybody and, on top of it, one for each group of clients.

The general expert is what fedpeft makes of the same recipe, to the bit, whatever the groups do. After a
common warm-up clients are grouped (`[method.experts]`), by the cosine of where their rows move B (FedLEASE,
Wang et al. 2025, arXiv:2509.15087) or as the recipe says. Each round then has a second question: the
members of a group train their expert beside the general one, which stands still meanwhile, so that an
expert learns what the general one leaves over.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fedtune.aggregate import Rule
from fedtune.experts.grouping import Clusters, direction_of
from fedtune.experts.need import allotted, at_rank, need
from fedtune.experts.sketch import sketch
from fedtune.experts.state import (
    A_END,
    OWN,
    below,
    experts_of,
    fresh_a,
    general_of,
    groups_of,
    joined,
    layers_of,
    made_so_far,
    only,
    sketches_of,
    with_groups,
)
from fedtune.methods.base import AdapterMethod
from fedtune.methods.experts_gate import BESIDE, GateRounds, install, write_beside
from fedtune.methods.experts_messages import Messages
from fedtune.methods.experts_settings import ExpertCosts, ExpertsSettings, moves_a, refuse_merging
from fedtune.methods.experts_sums import GateSums
from fedtune.methods.head_start import features_verbs, kept_until_started
from fedtune.methods.interface import Capabilities, Facts, Verb
from fedtune.methods.weights import TELLS, weight_of
from fedtune.rng import seed_of
from fedtune.schema import Schema
from fedtune.types import Client, Cohort, Round, State, Tensors, Update, if_answered

if TYPE_CHECKING:
    from fedtune.model.base import Base
    from fedtune.model.tunable import TunableModel

SPECIALISE, SKETCH, INPUTS = "specialise", "sketch", "inputs"  # the verbs beside `train`
ROWS = 256  # of a client, whose inputs are averaged
LOSS = "expert_loss"


class Experts(AdapterMethod):
    """State: the general adapter; experts/<id>/ of each group; members and sketches, kept."""

    settings: ExpertsSettings

    def __init__(self, settings: ExpertsSettings, rounds: int, rule: Rule) -> None:
        super().__init__(settings, rounds)
        self.rule, self.grouping = rule, settings.experts
        self.messages = Messages(settings, rule)
        self.gate = GateRounds(settings, rounds, rule, self.messages)
        self.sums = GateSums(self.grouping, self.messages) if self.grouping.gate.fit == "sums" else None

    def prepare(self, base: Base, seed: int) -> TunableModel:
        from fedtune.model.lora_ranks import freeze

        tunable = super().prepare(base, seed)
        freeze(tunable, tunable.named.keys() - self.messages.ever(tunable.named))
        self.messages.beside(tunable)  # raises M306 where the model has no layers for experts
        return tunable

    # --- on the server

    def start(self, tunable: TunableModel) -> State:
        return State(tunable.read(), kept_until_started(self.settings.head_start, tunable))

    def round(self, state: State, cohort: Cohort, now: Round) -> State:
        if self.gate.due(now.number, experts_of(state.shared)):
            return self.gate.round(state, cohort, self.in_groups(groups_of(state.kept), now))
        state = self.begin(state, cohort)
        before = general_of(state.shared)
        general = self.rule.from_mean(before, cohort.sum("train", before).values())
        if now.number <= self.grouping.warm_up:
            return State(general, state.kept)
        kept = self.grouped(general, state.kept, cohort, now)
        groups = groups_of(kept)
        asked = self.in_groups(groups, now)
        known = experts_of(state.shared)
        if self.grouping.asks:  # a group that is not found again has no members, and its id is not reused
            known = {name: tensors for name, tensors in known.items() if name in groups}
        gate: Tensors = {}
        if asked:
            known, kept = self.specialised(general, known, kept, asked, cohort, now)
            if now.number == self.gate.first - 1 and self.tells_inputs:
                kept = self.with_inputs(general, kept, asked, cohort)
            if now.number == self.rounds and self.sums and len(known) > 1:
                groups = groups_of(kept)
                beside = [client for client in now.members if not self.grouping.of(client, groups)]
                gate = self.sums.gate(general, sorted(known), asked, beside, cohort, now)
        return joined(general, known, kept, gate)

    def in_groups(self, groups: Mapping[str, tuple[int, ...]], now: Round) -> dict[int, str]:
        """The members of a round whose group has enough of them, and their experts."""
        chosen = {client: self.grouping.of(client, groups) for client in now.members}
        sizes = Counter(chosen.values())
        return {
            client: name for client, name in chosen.items() if sizes[name] >= self.grouping.least and name
        }

    def grouped(self, general: Tensors, kept: Tensors, cohort: Cohort, now: Round) -> Tensors:
        """What is kept, with the sketches of this round's members and the groups that follow from them."""
        if not self.grouping.asks:
            return kept
        sketches, groups, made = sketches_of(kept), groups_of(kept), made_so_far(kept)
        due = self.grouping.due(now.number) or not sketches
        new = [client for client in now.members if due or client not in sketches]
        if not new:
            return kept
        came = if_answered(
            lambda: {client: update.values()[SKETCH] for client, update in cohort.each(SKETCH, general, new)}
        )
        if came is None:
            return kept  # the general expert has learned from this round; who is in which group can wait
        sketches |= came
        if due:
            groups, made = self.grouping.regroup(sketches, groups, made)
        else:
            for client in sorted(came):
                if name := self.grouping.joined(client, sketches, groups):
                    groups[name] = tuple(sorted((*groups[name], client)))
        cohort.note("experts", len(groups))
        cohort.note("without an expert", len(sketches) - sum(len(members) for members in groups.values()))
        return with_groups(kept, groups, sketches, made)

    def specialised(
        self,
        general: Tensors,
        known: dict[str, dict[str, np.ndarray]],
        kept: Tensors,
        asked: Mapping[int, str],
        cohort: Cohort,
        now: Round,
    ) -> tuple[dict[str, dict[str, np.ndarray]], Tensors]:
        """The next experts, from one question to all groups; who has shared one is kept."""
        by_need = self.grouping.rank == "auto" and not known  # once, by the first sums
        first = self.messages.first(general, set(asked.values()), groups_of(kept), now.seed)
        before = {name: known.get(name, first[name]) for name in sorted(set(asked.values()))}
        if self.grouping.shape != "whole":
            known = {**first, **known}
        sums = if_answered(
            lambda: cohort.sum_groups(
                SPECIALISE,
                lambda name: {**general, **below(OWN, before[name])},
                asked.get,
                self.grouping.least,
            )
        )
        if sums is None:
            return known, kept  # no group is left: experts stay as they are
        groups = groups_of(kept)
        for name, total in sums.items():
            mean = {tensor.removeprefix(OWN): value for tensor, value in total.values().items()}
            known[name] = self.rule.from_mean(before[name], mean)
            cohort.note(f"{LOSS}/{name}", total.mean().metrics[LOSS])
            members = {client for client, group in asked.items() if group == name}
            groups[name] = tuple(sorted(members | set(groups.get(name, ()))))
        known = self.ranked(known, cohort) if by_need else known
        weight = sum(total.weight for total in sums.values())
        cohort.note(LOSS, sum(total.metrics[LOSS] for total in sums.values()) / weight)
        return known, with_groups(kept, groups, sketches_of(kept), made_so_far(kept))

    def ranked(self, known: Mapping[str, Tensors], cohort: Cohort) -> dict[str, dict[str, np.ndarray]]:
        """First experts at the ranks that they need, of as many in all as before; later ones begin at equal
        rank."""
        ranks = allotted({name: need(tensors) for name, tensors in known.items()}, self.settings.lora.rank)
        for name, rank in ranks.items():
            cohort.note(f"expert_rank/{name}", rank)
        return {name: at_rank(tensors, ranks[name]) for name, tensors in known.items()}

    def with_inputs(
        self, general: Tensors, kept: Tensors, asked: Mapping[int, str], cohort: Cohort
    ) -> Tensors:
        """What is kept, with each group's mean inputs."""
        sums = if_answered(lambda: cohort.sum_groups(INPUTS, general, asked.get, self.grouping.least))
        if sums is None:
            return kept  # routers can do without
        return {
            **kept,
            **{
                f"{INPUTS}/{name}/{layer}": value
                for name, total in sums.items()
                for layer, value in total.values().items()
            },
        }

    @property
    def tells_inputs(self) -> bool:
        """A layer's width is told by its A, which has to travel."""
        return self.grouping.inputs and moves_a(self.rule)

    def install(self, state: State, tunable: TunableModel) -> None:
        """The general expert, which is what a client without an expert has; and on top of it all others, once
        there is a gate."""
        install(state, tunable, self.grouping.gate)

    def export(
        self, form: str, state: State, tunable: TunableModel, folder: Path, card: str, seed: int
    ) -> None:
        """The general expert, as stock peft reads it; with a gate, beside it what `fedtune.load` puts on top.
        Raises M306 for a merged model of a state with a gate."""
        if tunable.routed is not None:
            refuse_merging(form)
            card += BESIDE
        super().export(form, state, tunable, folder, card, seed)
        if tunable.routed is not None:
            write_beside(state, tunable, folder)

    # --- what travels

    @property
    def verbs(self) -> Mapping[str, Verb]:
        rule = self.rule
        train = Verb(
            self.train,
            lambda tunable, client, now: self.messages.general(tunable),
            lambda given, now: only(given, rule.sends(given.shapes, now.number)),
            moves=True,
        )
        specialise = Verb(
            self.specialise,
            lambda tunable, client, now: self.messages.beside(tunable),
            lambda given, now: only(given, self.messages.sent(given, now)),
            reads_each=self.grouping.single,
            by_group=not self.grouping.single,
            moves=True,
            otherwise=self.messages.others,
            shows=""
            if self.grouping.single
            else f"a group has {self.grouping.least} members or more, whom the server knows",
        )
        return {
            "train": train,
            SPECIALISE: specialise,
            **self.sketches(),
            **self.inputs(),
            **self.gate.verbs,
            **(self.sums.verbs if self.sums else {}),
            **features_verbs(self.settings.head_start),
        }

    def sketches(self) -> dict[str, Verb]:
        if not isinstance(self.grouping, Clusters):
            return {}
        size, noise = self.grouping.sketch, self.grouping.noise
        shows = (
            f"{size} numbers that tell how much the directions in which two clients' rows move the model "
            f"are alike, {f'with noise of deviation {noise:g} on each' if noise else 'without noise'}"
        )
        verb = Verb(
            self.tell_sketch,
            lambda tunable, client, now: self.messages.general(tunable),
            lambda given, now: Schema(((SKETCH, (size,)),)),
            reads_each=True,
            shows=shows,
            once=not self.grouping.recluster_every,
        )
        return {SKETCH: verb}

    def inputs(self) -> dict[str, Verb]:
        if not self.tells_inputs:
            return {}
        whose = "its rows" if self.grouping.single else f"the rows of {self.grouping.least} clients or more"
        verb = Verb(
            self.tell_inputs,
            lambda tunable, client, now: self.messages.general(tunable),
            lambda given, now: Schema(tuple((layer, (2, shape[1])) for layer, shape in layers_of(given))),
            reads_each=self.grouping.single,
            by_group=not self.grouping.single,
            shows=f"the mean and mean square, over {whose}, of what comes into each adapted layer",
            once=True,
        )
        return {INPUTS: verb}

    # --- on each client

    def train(self, client: Client, given: Tensors, now: Round) -> Update:
        tunable: TunableModel = client.model
        tunable.write(given)
        loss = self.fitted(client, now, "train", self.rule.trains(tunable.named, now.number))
        sent = self.rule.sends(tunable.named, now.number)
        values = {name: value for name, value in tunable.read().items() if name in sent}
        return Update.of(values, weight_of(self.settings.weight, client, loss), {"loss": loss})

    def tell_sketch(self, client: Client, given: Tensors, now: Round) -> Update:
        """Where this client's rows alone would move the general expert's B."""
        tunable: TunableModel = client.model
        tunable.write(given)
        self.fitted(client, now, SKETCH, frozenset(tunable.named))
        assert isinstance(self.grouping, Clusters)
        moved = direction_of(given, tunable.read())
        return Update.of({SKETCH: sketch(moved, self.grouping.sketch, now.seed, self.grouping.noise)})

    def tell_inputs(self, client: Client, given: Tensors, now: Round) -> Update:
        from fedtune.model.inputs import input_moments

        client.model.write(given)
        found, tokens = input_moments(client.model, client.data, ROWS)
        layers = [layer for layer, _ in layers_of(Schema.of(given))]
        return Update.of({layer: found[layer] for layer in layers}, tokens)

    def specialise(self, client: Client, given: Tensors, now: Round) -> Update:
        """Train an expert; the general one stands beneath it and does not move."""
        from fedtune.model.lora_ranks import on_top, unstack

        tunable: TunableModel = client.model
        general = {name: value for name, value in given.items() if not name.startswith(OWN)}
        own = {name.removeprefix(OWN): value for name, value in given.items() if name.startswith(OWN)}
        seeded = {
            name: fresh_a(name, tuple(value.shape), now.seed)
            for name, value in tunable.still.items()
            if name.endswith(A_END)
        }
        trained = self.rule.trains(own, now.number)
        with on_top(tunable, general, {**seeded, **own}) as extra:
            loss = self.fitted(client, now, SPECIALISE, trained, extra)
            values = unstack(tunable.read(), extra)
        sent = {OWN + name: values[name] for name in sorted(self.rule.sends(own, now.number))}
        return Update.of(sent, weight_of(self.settings.weight, client, loss, SPECIALISE), {LOSS: loss})

    def fitted(self, client: Client, now: Round, verb: str, names: frozenset[str], extra: int = 0) -> float:
        """Train these tensors on the client's rows; the mean loss."""
        from fedtune.model.fit import fit
        from fedtune.model.lora_ranks import training_only

        seed = seed_of(verb, now.seed, now.number, client.id)
        with training_only(client.model, names, extra):
            report = fit(
                client.model,
                client.data,
                self.settings.train,
                seed,
                progress=(now.number - 1, self.rounds),
            )
        return report.loss

    # --- around a run

    @property
    def facts(self) -> Facts:
        return Facts(
            "experts",
            f"experts / {self.grouping.by}",
            metrics=("loss", LOSS, *self.gate.figures),
            weight=TELLS[self.settings.weight],
        )

    @property
    def capabilities(self) -> Capabilities:
        least = self.grouping.least
        return Capabilities(
            costs=ExpertCosts(self.settings),
            also_see={
                "members": "the general expert and their own group's, "
                f"which at least {least} client{'s' * (least > 1)} made; of other groups "
                + ("all experts, in the rounds of the gate" if self.grouping.gate.rounds else "nothing")
            },
        )


class ExpertsTable(ExpertsSettings):
    """[method] type = "experts"."""

    def build(self, rounds: int, rule: Rule) -> Experts:
        return Experts(self, rounds, rule)

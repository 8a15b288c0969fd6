"""The last rounds of a run of experts: a gate over all of them is trained by clients, and nothing else moves.

Down: the general expert, all others as one pair of factors a layer, the gate. Up: the gate. It starts from
the groups' mean inputs (fedtune/experts/gates.py), which are summed up in the last round of the experts
themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedtune.aggregate import Rule
from fedtune.errors import Refused
from fedtune.experts.gate_table import GateTable
from fedtune.experts.need import MOST
from fedtune.experts.shapes import Where
from fedtune.experts.state import (
    A_END,
    B_END,
    EXPERTS,
    GATE,
    experts_of,
    gate_of,
    general_of,
    inputs_of,
    joined,
    only,
    rank_of,
    sizes_of,
)
from fedtune.methods.experts_messages import Messages
from fedtune.methods.experts_settings import ExpertsSettings
from fedtune.methods.interface import Verb
from fedtune.methods.weights import weight_of
from fedtune.rng import seed_of
from fedtune.schema import Schema
from fedtune.types import LM_TASKS, Client, Cohort, Round, State, Tensors, Update

if TYPE_CHECKING:
    from fedtune.model.tunable import TunableModel

TUNE = "gate"  # the verb
OWN_ROW, RANKS = f"{EXPERTS}own", f"{EXPERTS}ranks"  # whose group is asked; the rank of each expert
LOSS, ENTROPY, SHARE = "gate_loss", "gate_entropy", "gate_share/"
STARVED = 0.1  # of an even share: who has less is starved
COLLAPSED = 0.95  # of everything
BESIDE = """
This is the general expert of a federation of experts. The others, and the gate that mixes them token by
token, lie in `experts/`: `fedtune.load` puts them on top, other programs load the general one alone.
"""


class GateRounds:
    def __init__(self, settings: ExpertsSettings, rounds: int, rule: Rule, messages: Messages) -> None:
        self.settings, self.rule, self.messages = settings, rule, messages
        self.table, self.grouping = settings.experts.gate, settings.experts
        self.first = rounds - self.table.rounds + 1

    def due(self, number: int, experts: Mapping[str, Tensors]) -> bool:
        """Whether this round trains the gate: it is one of the last, and there is something to choose
        from."""
        return bool(self.table.rounds and number >= self.first and len(experts) + self.table.null > 1)

    # --- on the server

    def round(self, state: State, cohort: Cohort, asked: Mapping[int, str]) -> State:
        """`asked`: the members whose groups are large enough, and their experts."""
        from fedtune.experts.trained import stacked, start

        general, experts = general_of(state.shared), experts_of(state.shared)
        names = sorted(experts)
        where = self.messages.where(Schema.of(general), len(names))
        sizes, inputs = sizes_of(Schema.of(general).shapes), inputs_of(state.kept)
        gate = gate_of(state.shared) or start(names, inputs, sizes, where, self.table.null)
        given: dict[str, np.ndarray] = {
            **general,
            **{EXPERTS + name: value for name, value in stacked(experts).items()},
            **gate,
            OWN_ROW: np.zeros(len(names), np.float32),
            RANKS: np.array([rank_of(experts[name]) for name in names], np.float32),
        }
        total = cohort.sum(TUNE, self.to_each(given, names, asked) if self.table.tells_own else given)
        self.note_health(total.mean().metrics, where, len(names), cohort)
        return joined(general, experts, state.kept, self.rule.from_mean(gate, total.values()))

    def to_each(
        self, given: Mapping[str, np.ndarray], names: list[str], asked: Mapping[int, str]
    ) -> Callable[[int], Tensors]:
        """By client: which of the experts is its own group's, if any."""
        told = {
            name: {**given, OWN_ROW: np.array([name == one for one in names], np.float32)}
            for name in ("", *names)
        }
        return lambda client: told.get(asked.get(client, ""), told[""])

    def note_health(self, told: Mapping[str, float], where: Where, count: int, cohort: Cohort) -> None:
        """How many experts are hardly asked, and whether one has everything; their shares are figures of the
        answers, numbered in the order of ids. Even shares are those of the layers where an expert lives."""
        shares = [told[f"{SHARE}{number}"] for number in range(count)]
        nobody = [told[f"{SHARE}null"]] if self.table.null else []
        asked = [where.living[layer] for layer in where.gated]
        even = [
            sum(1 / (len(who) + len(nobody)) for who in asked if number in who) / len(asked)
            for number in range(count)
        ]
        cohort.note("gate_starved", sum(a < STARVED * b for a, b in zip(shares, even, strict=True)))
        cohort.note("gate_collapsed", max(shares + nobody) > COLLAPSED)

    # --- what travels

    @property
    def figures(self) -> tuple[str, ...]:
        if not self.table.rounds:
            return ()
        numbers = [*map(str, range(self.grouping.slots)), *(["null"] if self.table.null else [])]
        return (LOSS, ENTROPY, *(SHARE + number for number in numbers))

    @property
    def verbs(self) -> dict[str, Verb]:
        if not self.table.rounds:
            return {}
        verb = Verb(
            self.tune,
            lambda tunable, client, now: self.schema(tunable, self.grouping.slots, 0),
            lambda given, now: only(given, [name for name in given.shapes if name.startswith(GATE)]),
            moves=True,
            late=True,
            shows="a linear gate over all experts, and how much of its tokens each expert was given",
            otherwise=self.schemas,
        )
        return {TUNE: verb}

    def schemas(self, tunable: Any, client: int, now: Round) -> Iterator[Schema]:
        """Of fewer experts, and of other ranks where those are by need: as many in all, but for groups that
        came or went later."""
        rank, slots = self.settings.lora.rank, self.grouping.slots
        yield from (self.schema(tunable, count, 0) for count in range(1, slots))
        if self.grouping.rank == "auto":
            yield from (
                self.schema(tunable, count, total)
                for count in range(1, slots + 1)
                for total in range(count, MOST * rank * count + 1)
                if total != rank * count
            )

    def schema(self, tunable: Any, count: int, total: int) -> Schema:
        """So many experts of so many ranks in all; 0: as many as equal ones have."""
        general = self.messages.general(tunable)
        entries = [*general.entries, (OWN_ROW, (count,)), (RANKS, (count,))]
        where = self.messages.where(general, count)
        for layer, (width, height) in sizes_of(general.shapes).items():
            here = len(where.living[layer])
            rank, rows = total or here * self.settings.lora.rank, here + self.table.null
            if here:
                entries += [(f"{EXPERTS}{layer}{A_END}", (rank, width))]
                entries += [(f"{EXPERTS}{layer}{B_END}", (height, rank))]
            if layer in where.gated:
                entries += [(f"{GATE}{layer}.weight", (rows, width)), (f"{GATE}{layer}.bias", (rows,))]
        return Schema(tuple(sorted(entries)))

    # --- on each client

    def tune(self, client: Client, given: Tensors, now: Round) -> Update:
        """Train the gate on this client's rows. Raises Refused W603 for ranks that are not those of the
        experts."""
        from fedtune.experts.routers import router
        from fedtune.experts.trained import (
            apart,
            balanced,
            gates_of,
            routing_of,
            scaled,
            take_off,
            training_gates,
            with_terms,
        )
        from fedtune.model.fit import fit
        from fedtune.model.lora_ranks import scale_of
        from fedtune.model.loss import carries

        tunable: TunableModel = client.model
        whole = {
            name.removeprefix(EXPERTS): value
            for name, value in given.items()
            if name.startswith(EXPERTS) and name.endswith((A_END, B_END))
        }
        living = self.messages.where(Schema.of(general_of(given)), len(given[RANKS])).living
        ranks = checked_ranks(given[RANKS], living, whole)
        take_off(tunable)
        tunable.write(general_of(given))
        scale, causal = scale_of(tunable), tunable.base.task in LM_TASKS
        experts = {name: scaled(some, scale) for name, some in apart(whole, ranks, living).items()}
        gates = gates_of(gate_of(given), self.table.prefix)
        made = router(experts, {}, routing_of(self.table), causal, null=self.table.null, gates=gates)
        made.also = balanced(self.table, given[OWN_ROW])
        train = self.settings.train.model_copy(update={"lr": self.table.lr})
        seed = seed_of(TUNE, now.seed, now.number, client.id)
        progress = (now.number - self.first, self.table.rounds)
        with training_gates(tunable, made):
            around = with_terms(made, carries)
            report = fit(tunable, client.data, train, seed, progress=progress, around=around)
            values = tunable.read()
        names = [*map(str, range(len(ranks))), *(["null"] if self.table.null else [])]
        health = made.health.report(names)
        figures = {LOSS: report.loss, ENTROPY: health["entropy"]}
        figures |= {SHARE + name: share for name, share in health["shares"].items()}
        return Update.of(values, weight_of(self.settings.weight, client, report.loss, TUNE), figures)


def checked_ranks(said: np.ndarray, living: Mapping[str, tuple[int, ...]], whole: Tensors) -> list[int]:
    """Whole numbers that add up, over those that live in a layer, to the rank there."""
    ranks = [int(rank) for rank in said]
    held = {name.removesuffix(B_END): value.shape[1] for name, value in whole.items() if name.endswith(B_END)}
    fit = all(sum(ranks[number] for number in living[layer]) == rank for layer, rank in held.items())
    if list(said) != ranks or min(ranks) < 1 or not fit:
        raise Refused(
            "W603",
            f"ranks {ranks[:8]} of experts of {max(held.values())} in all",
            "those of the experts",
            "use the same version of fedtune on both sides",
        )
    return ranks


# --- a state with a gate on the model, and in a folder


def install(state: State, tunable: TunableModel, table: GateTable) -> None:
    """The general expert and, where the state has a gate, all others on top of it."""
    from fedtune.experts.trained import put_on, router_of, take_off
    from fedtune.model.lora_ranks import scale_of

    take_off(tunable)
    tunable.write(general_of(state.shared))
    if gate_of(state.shared):
        put_on(tunable, router_of(state.shared, table, scale_of(tunable), tunable.base.task in LM_TASKS))


def write_beside(state: State, tunable: TunableModel, folder: Path) -> None:
    """All experts but the general one, and the gate: what `fedtune.experts.trained.load_whole` reads."""
    from fedtune.experts.trained import save_whole, scaled
    from fedtune.model.lora_ranks import scale_of

    scale = scale_of(tunable)
    experts = {name: scaled(some, scale) for name, some in experts_of(state.shared).items()}
    save_whole(tunable.routed, experts, folder / EXPERTS)

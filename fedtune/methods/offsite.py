"""Offsite tuning: clients train the two ends of a model that they never hold, on an emulator of the rest.

Xiao, Lin and Han 2023, "Offsite-Tuning: Transfer Learning without Full Model" (arXiv:2302.04870). Training,
aggregation and messages are FedPEFT's, on the emulator's network; what was trained is then plugged into the
model, which only its owner has. In a simulation one process makes the emulator of the model; real sites are
given it as a folder (`fedtune offsite`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fedtune.aggregate import Rule
from fedtune.errors import FedtuneError
from fedtune.methods.fedpeft import FedPEFT
from fedtune.methods.fedpeft_ranks import FedPEFTCosts
from fedtune.methods.interface import Capabilities, Facts, RunEnd
from fedtune.methods.offsite_settings import OffsiteSettings
from fedtune.methods.one_client import begin_alone
from fedtune.model.settings import whole_run
from fedtune.schema import Schema
from fedtune.types import Round, State

if TYPE_CHECKING:
    from fedtune.model.base import Base
    from fedtune.model.emulator import Emulation
    from fedtune.model.encode import Encoded
    from fedtune.model.memory_plan import Plan
    from fedtune.model.settings import ModelSettings
    from fedtune.model.tunable import TunableModel


class Offsite(FedPEFT):
    """State: FedPEFT's, by the names that tensors have in the emulator. Where the whole model is, the tunable
    model is that, with the emulator's beside it (`TunableModel.emulator`)."""

    settings: OffsiteSettings

    # --- the model and its emulator ---

    def prepare(self, base: Base, seed: int) -> TunableModel:
        """Of the whole model, with its emulator; or of an emulator's folder. Raises S701, S721."""
        from fedtune.model.emulator import Emulation, emulate
        from fedtune.split.anatomy import look

        known = Emulation.read(base.net.config)
        if known is not None:
            self.check_emulator(known)
            return self.seated(base, known, len(known.kept), seed)
        anatomy = look(type(base.net), base.net.config)
        about = Emulation(
            anatomy.layers,
            anatomy.blocks,
            self.settings.kept(anatomy.blocks),
            self.settings.bits,
            distilled=bool(self.settings.distil.data),
        )
        ends, distil = self.settings.trained(len(about.kept)), self.settings.distil
        made = None
        if distil.data and base.device.type != "meta":
            from fedtune.model.distil import kept_or_distilled

            made = kept_or_distilled(base, about, ends, distil, seed)
        small = emulate(base, about, ends, made.tensors if made else None)
        tunable = self.seated(base, about, anatomy.blocks, seed)
        tunable.distilled = made.figures if made else {}
        tunable.emulator = self.seated(small, about, len(about.kept), seed)
        copy_still(tunable, about)
        return tunable

    def seated(self, base: Base, about: Emulation, blocks: int, seed: int) -> TunableModel:
        """The adapter on the ends of a network of so many blocks."""
        from fedtune.model.emulator import at_blocks

        numbers = self.settings.trained(blocks)
        return self.attached(base, at_blocks(base, self.settings.adapter, about.layers, numbers), seed)

    def check_emulator(self, known: Emulation) -> None:
        """Raises S721 where a folder's emulator is of other blocks than this run's."""
        s = self.settings
        wanted = replace(known, kept=s.kept(known.blocks), bits=s.bits, distilled=bool(s.distil.data))
        if known != wanted:
            raise FedtuneError(
                "S721",
                f"an emulator of {known.in_words} at this site",
                f"one of {wanted.in_words}, as the recipe says",
                "get the emulator that the coordinator's fedtune offsite wrote for this recipe",
            )

    def install(self, state: State, tunable: TunableModel) -> None:
        """Into the model itself, where it is here: the plug-in."""
        super().install(self.in_model(state, tunable), tunable)

    def in_model(self, state: State, tunable: TunableModel) -> State:
        """A state by the names of a tunable model's own tensors."""
        if tunable.emulator is None:
            return state
        about = emulation_of(tunable.emulator)
        return State(about.plugged(state.shared), about.plugged(state.kept))

    # --- what FedPEFT asks of the tunable model, asked of what clients have ---

    def start(self, tunable: TunableModel) -> State:
        return super().start(tunable.at_clients)

    def given(self, tunable: Any, client: int, now: Round) -> Schema:
        return super().given(tunable.at_clients, client, now)

    def alone(self, tunable: TunableModel, data: Encoded, state: State, seed: int) -> None:
        """On the emulator; what was trained is then plugged in."""
        small = tunable.emulator
        super().alone(small or tunable, data, state, seed)
        if small is not None:
            self.install(state, tunable)  # at the ranks of the state
            tunable.write(emulation_of(small).plugged(small.read()))

    def shrink(self, state: State, tunable: TunableModel, rank: int) -> float:
        return super().shrink(self.in_model(state, tunable), tunable, rank)

    # --- what offsite tuning is measured against ---

    def untuned(self, end: RunEnd) -> TunableModel:
        """The emulator before any training."""
        mine: TunableModel = end.tunable.at_clients
        super().install(end.start, mine)
        return mine

    def tuned(self, end: RunEnd) -> TunableModel:
        """The emulator with what was trained on it: what clients have in the end."""
        mine: TunableModel = end.tunable.at_clients
        super().install(end.state, mine)
        return mine

    def fully_tuned(self, end: RunEnd) -> TunableModel:
        """The same adapter in all blocks of the model, trained on all rows in one place."""
        from fedtune.model.emulator import emulate
        from fedtune.model.fit import fit

        about = emulation_of(end.tunable.at_clients)
        every = range(about.blocks)
        whole = emulate(end.tunable.base, replace(about, kept=tuple(every), bits=0, distilled=False), every)
        tunable = self.attached(whole, self.settings.adapter, end.seed)
        begin_alone(self, tunable, end.pooled(), super().start(tunable), end.seed)
        fit(tunable, end.pooled(), whole_run(self.settings.train, self.rounds), end.seed, progress=(0, 1))
        return tunable

    # --- around a run ---

    @property
    def facts(self) -> Facts:
        s, known = self.settings, super().facts
        rounded = f" in {s.bits} bits" if s.bits else ""
        ends = f"{s.first} + {s.last} blocks, {100 * s.keep:g} % of those between{rounded}"
        return replace(known, type="offsite", title=f"offsite{known.title.removeprefix('fedpeft')} / {ends}")

    @property
    def capabilities(self) -> Capabilities:
        s = self.settings
        learns = (
            f"every client holds of the owner's model: embeddings, output layer, the first {s.first} and the "
            f"last {s.last} blocks as they are, {100 * s.keep:g} % of the blocks between"
            + (f" in {s.bits} bits" if s.bits else "" if s.distil.data else " as they are")
            + (", distilled to stand for all of them" if s.distil.data else "")
            + ", and may use, train and pass on what these are good for; not the other blocks, and no answer "
            "of the model itself"
        )
        full = {"full tuning": self.fully_tuned} if s.full else {}
        return replace(
            super().capabilities,
            costs=OffsiteCosts(s, self),
            also_see={"emulator": learns},
            also_scored={"emulator": self.untuned, "emulator tuned": self.tuned, **full},
        )


class OffsiteCosts(FedPEFTCosts):
    """Of a client: it holds and trains the emulator."""

    settings: OffsiteSettings

    def __init__(self, settings: OffsiteSettings, method: Offsite) -> None:
        super().__init__(settings, method.extra)
        self.method = method

    def plan(self, model: ModelSettings, task: str, labels: int) -> Plan:
        from fedtune.model.memory_plan import plan_of, weightless
        from fedtune.model.step_memory import peak_of

        tunable = self.method.prepare(weightless(model, task, labels), 0).at_clients
        return replace(plan_of(tunable), peak=peak_of(tunable))

    def remarks(self, recipe: Any, labels: int, rows: float) -> list[str]:
        from fedtune.model.emulator import shares
        from fedtune.model.memory_plan import weightless

        tunable = self.method.prepare(weightless(recipe.model, recipe.data.task, labels), 0)
        if tunable.emulator is None:
            return []
        about, model = emulation_of(tunable.emulator), tunable.base
        held = ", ".join(
            f"{100 * count / model.size:.1f} % of its values {how}"
            for how, count in shares(model, tunable.emulator.base)
            if count
        )
        blocks = f"emulator  {len(about.kept)} of the model's {about.blocks} blocks {about.kept}"
        if about.distilled:
            d = self.settings.distil
            return [f"{blocks}; those between the ends are distilled first, {d.steps} steps on '{d.data}'"]
        return [f"{blocks}: {held}"]


class OffsiteTable(OffsiteSettings):
    """[method] type = "offsite"."""

    def build(self, rounds: int, rule: Rule) -> Offsite:
        return Offsite(self, rounds, rule)


def emulation_of(tunable: TunableModel) -> Emulation:
    """Of what an emulator's tunable model is one."""
    from fedtune.model.emulator import Emulation

    about = Emulation.read(tunable.base.net.config)
    assert about is not None  # `emulate` wrote it
    return about


def copy_still(tunable: TunableModel, about: Emulation) -> None:
    """What no round trains stays as the seed made it, in the model as in its emulator."""
    assert tunable.emulator is not None
    for name, value in tunable.emulator.still.items():
        tunable.still[about.in_model(name)].data.copy_(value.data)

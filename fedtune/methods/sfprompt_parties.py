"""What SFPrompt can say and do for each party of a split run. torch is imported where it is needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from fedtune.methods.sfprompt_settings import SFPromptSettings
from fedtune.model.settings import ModelSettings

if TYPE_CHECKING:
    from fedtune.model.base import Base
    from fedtune.model.memory_plan import Plan
    from fedtune.model.tunable import TunableModel
    from fedtune.split.facts import SplitFacts
    from fedtune.split.parts import Part


@dataclass(frozen=True)
class SplitModel:
    """The `Split` of SFPrompt."""

    settings: SFPromptSettings

    @property
    def place(self) -> Mapping[str, int]:
        return {"head": self.settings.head, "tail": self.settings.tail}

    @property
    def merges(self) -> bool:
        return self.settings.merge

    @property
    def codec(self) -> str:
        return self.settings.codec

    def describe(self, tunable: TunableModel) -> SplitFacts:
        from fedtune.methods.sfprompt_site import describe

        return describe(tunable)

    def load_site(
        self, model: ModelSettings, task: str, labels: Sequence[str], seed: int, told: SplitFacts
    ) -> Base:
        """`prepare` makes the same tunable model of it as of the whole model."""
        from fedtune.methods.sfprompt_site import load_site

        return load_site(self.settings, model, task, labels, seed, told)

    def load_body(self, model: ModelSettings, task: str) -> Part:
        from fedtune.methods.sfprompt_site import load_body

        return load_body(self.settings, model, task)

    def holds_parts(self, tunable: Any) -> bool:
        return tunable.base.part is not None


@dataclass(frozen=True)
class SFPromptCosts:
    """What a client holds, trains and sends through the cut."""

    settings: SFPromptSettings

    def plan(self, model: ModelSettings, task: str, labels: int) -> Plan:
        """The base's bytes are those of head and tail, its layers those that keep activations."""
        from fedtune.methods.sfprompt_costs import client_bytes
        from fedtune.methods.sfprompt_net import cut_bench
        from fedtune.model.memory_plan import plan_of, weightless

        tunable = cut_bench(weightless(model, task, labels), self.settings, 0)
        through_head = self.settings.position == "input" or self.settings.head_learns
        kept = self.settings.tail + (self.settings.head if through_head else 0)
        return replace(plan_of(tunable), weights_bytes=client_bytes(tunable), layers=kept)

    def memory(self, plan: Plan, length: int) -> Mapping[str, int]:
        from fedtune.model.memory_plan import training_bytes

        return training_bytes(plan, self.settings.train, length + self.settings.prompts)

    def remarks(self, recipe: Any, labels: int, rows: float) -> list[str]:
        from fedtune.methods.sfprompt_costs import remarks

        return remarks(self.settings, recipe, labels, rows)

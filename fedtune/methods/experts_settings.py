"""The [method] table of type = "experts", which of its settings cannot go together, and what it costs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

from fedtune.aggregate import RULES, Rule
from fedtune.experts.grouping import Clusters, ExpertSettings
from fedtune.experts.state import A_END
from fedtune.methods.base import AdapterCosts, AdapterTable
from fedtune.methods.fedpeft_ranks import plan_at
from fedtune.model.adapters import Lora
from fedtune.privacy.masks import LEAST

if TYPE_CHECKING:
    from fedtune.model.memory_plan import Plan


class ExpertsSettings(AdapterTable):
    """The keys of [method] type = "experts"."""

    type: Literal["experts"] = "experts"
    experts: ExpertSettings = Clusters()

    @property
    def spends(self) -> None:
        """Nothing is bounded: groups are made from what clients tell of themselves."""
        return None

    def conflicts(self, recipe: Any) -> Iterator[tuple[str, str, str]]:
        yield from super().conflicts(recipe)
        if not isinstance(self.adapter, Lora) or self.adapter.dora:
            found = "dora = true" if isinstance(self.adapter, Lora) else f"kind = '{self.adapter.kind}'"
            yield (
                f"method.adapter.{found} with method.type = 'experts'",
                "plain LoRA, whose pairs add up",
                "set method.adapter.kind = 'lora' without dora",
            )
        if self.head_noise != "off":
            yield (
                "method.head_noise with method.type = 'experts'",
                "a method whose groups are not made from what clients tell of themselves",
                "remove method.head_noise, or set method.type = 'fedpeft'",
            )
        rule: Rule = recipe.aggregate
        if not sums_up(rule):
            known = ", ".join(
                sorted(tag for tag, other in RULES.items() if sums_up(other.model_construct(rule=tag)))
            )
            yield (
                f"aggregate.rule = '{rule.rule}' with method.type = 'experts'",
                f"a rule that needs sums only and leaves nothing at home: {known}",
                "change aggregate.rule",
            )
        if recipe.downlink.lossy or recipe.downlink.remembers:
            yield (
                f"downlink.step = '{recipe.downlink.step}' with method.type = 'experts'",
                "no [downlink], because groups are given different tensors",
                "remove [downlink]",
            )
        if self.train.weight_decay:
            yield (
                "method.train.weight_decay with method.type = 'experts'",
                "no weight decay, because it would wear down the general expert beneath",
                "remove it",
            )
        if self.experts.single and (hidden := hiding(recipe)):
            yield (
                f"method.experts.by = '{self.experts.by}', which reads single answers, beside '{hidden}'",
                "groups of several clients",
                f"set method.experts.by = 'clusters', or remove '{hidden}' from [[chain]]",
            )
        if self.experts.least < LEAST and "mask" in [step.step for step in recipe.chain]:
            yield (
                f"method.experts.min_clients = {self.experts.least} beside 'mask'",
                f"{LEAST} or more: of two, each would know the other's answer",
                f"set method.experts.min_clients = {LEAST}",
            )


def sums_up(rule: Rule) -> bool:
    return (
        rule.linear
        and not rule.core
        and not rule.carries
        and not rule.stays([f"a{A_END}", "a.lora_B.weight"])
    )


def hiding(recipe: Any) -> str:
    """A step of the chain that only a sum can undo."""
    steps = [step.build() for step in recipe.chain]
    return next((step.name for step in steps if step.undone == "sum" or step.hides), "")


class ExpertCosts(AdapterCosts):
    """As for any adapter, at twice the rank: the general expert stands beneath the one in training."""

    settings: ExpertsSettings

    def memory(self, plan: Plan, length: int) -> Mapping[str, int]:
        assert isinstance(self.settings.adapter, Lora)
        return super().memory(plan_at(plan, 2 * self.settings.adapter.rank), length)

    def remarks(self, recipe: object, labels: int, rows: float) -> list[str]:
        first = self.settings.experts.warm_up + 1
        return [
            f"experts   from round {first} on, members of a group train twice a round: the general expert, "
            "then their own; the bytes above are of such a round"
        ]

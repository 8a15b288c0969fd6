"""The [method] table of type = "experts", which of its settings cannot go together, and what it costs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal

from fedtune.aggregate import RULES, Rule
from fedtune.errors import FedtuneError
from fedtune.experts.discriminant import packed
from fedtune.experts.grouping import Clusters, ExpertSettings
from fedtune.experts.need import MOST
from fedtune.experts.shapes import Where
from fedtune.experts.state import A_END, B_END, sizes_of
from fedtune.methods.base import AdapterCosts, AdapterTable
from fedtune.methods.fedpeft_ranks import plan_at
from fedtune.model.adapters import Lora
from fedtune.privacy.masks import LEAST

if TYPE_CHECKING:
    from fedtune.model.base import Base
    from fedtune.model.memory_plan import Plan


SHARES = 48  # experts whose shares an answer can tell


class ExpertsSettings(AdapterTable):
    """The keys of [method] type = "experts"."""

    type: Literal["experts"] = "experts"
    experts: ExpertSettings = Clusters()

    @property
    def lora(self) -> Lora:
        """The adapter, which is LoRA: `conflicts` refuses others."""
        assert isinstance(self.adapter, Lora)
        return self.adapter

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
        if self.experts.rank == "auto" and not moves_a(rule):
            yield (
                f"method.experts.rank = 'auto' with aggregate.rule = '{rule.rule}'",
                "a rule that trains both factors, so that an expert can change its rank",
                "set aggregate.rule = 'mean', or method.experts.rank = 'equal'",
            )
        yield from self.shape_conflicts()
        yield from self.within_conflicts(recipe)
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
        if self.experts.gate.made:
            yield from self.gate_conflicts(recipe)

    def shape_conflicts(self) -> Iterator[tuple[str, str, str]]:
        """Who lives where is decided once, of experts that are all alike in size."""
        found = f"method.experts.shape = '{self.experts.shape}'"
        if self.experts.shape == "whole":
            return
        if self.experts.single:
            yield (
                f"{found} with method.experts.by = '{self.experts.by}'",
                "groups: an owner's expert comes with all its layers",
                "set method.experts.by = 'clusters', or leave shape out",
            )
        if self.experts.rank == "auto":
            yield f"{found} with method.experts.rank = 'auto'", "equal ranks", "leave one of them out"
        if isinstance(self.experts, Clusters) and self.experts.recluster_every:
            yield (
                f"{found} with method.experts.recluster_every = {self.experts.recluster_every}",
                "groups that are found once, because each keeps the blocks that its expert lives in",
                "leave one of them out",
            )

    def within_conflicts(self, recipe: Any) -> Iterator[tuple[str, str, str]]:
        """Experts of feed-forward blocks, and gates of blocks."""
        experts, found = self.experts, "method.experts.within = 'feed-forward'"
        if experts.within != "all" and not moves_a(recipe.aggregate):
            yield (
                f"{found} with aggregate.rule = '{recipe.aggregate.rule}'",
                "a rule that trains both factors, by whose widths blocks are known",
                "set aggregate.rule = 'mean', or leave within out",
            )
        if experts.gate.per == "block" and experts.within == "all":
            yield (
                "method.experts.gate.per = 'block' with experts in all layers",
                "experts of feed-forward blocks",
                "set method.experts.within = 'feed-forward'",
            )
        if experts.preset == "mixlora" and not experts.gate.rounds:
            yield (
                "method.experts.preset = 'mixlora' without rounds of the gate",
                "method.experts.gate.rounds",
                "set it, or leave the preset out",
            )

    def require(self, base: Base) -> None:
        """Raises M306 for a shape of one block of the network."""
        from fedtune.model.adapters.layers import block_numbers, target_layers

        super().require(base)
        if (
            self.experts.shape != "whole"
            and len(set(block_numbers(target_layers(base, self.lora)).values())) < 2
        ):
            raise FedtuneError(
                "M306",
                f"method.experts.shape = '{self.experts.shape}' with LoRA in fewer than two blocks",
                "a depth over which the number of experts varies",
                "adapt more blocks, or leave shape out",
            )

    def gate_conflicts(self, recipe: Any) -> Iterator[tuple[str, str, str]]:
        """What [method.experts.gate] needs of the rest."""
        gate = self.experts.gate
        what = "method.experts.gate" + (".fit = 'sums'" if gate.fit == "sums" else ".rounds")
        if self.experts.single:
            yield (
                f"{what} with method.experts.by = '{self.experts.by}'",
                "groups, because every member is given all experts to train the gate",
                "set method.experts.by = 'clusters'",
            )
        if (gate.fit == "steps" and not self.experts.inputs) or not moves_a(recipe.aggregate):
            yield (
                f"{what} without the groups' mean inputs, from which the gate starts",
                "method.experts.inputs = true, and a rule that trains both factors",
                "set them, or leave [method.experts.gate] out",
            )
        if gate.out_of_place:
            yield (
                f"method.experts.gate.{gate.out_of_place[0]} with method.experts.gate.fit = '{gate.fit}'",
                "keys of this way of making a gate",
                "leave it out",
            )
        if gate.fit == "sums" and self.experts.shape != "whole":
            yield (
                f"method.experts.shape = '{self.experts.shape}' with method.experts.gate.fit = 'sums'",
                "experts in all blocks, because all layers have a say of each",
                "leave one of them out",
            )
        if recipe.rounds - gate.rounds <= self.experts.warm_up:
            yield (
                f"{what}, {gate.rounds} of {recipe.rounds} rounds, after {self.experts.warm_up} of warm-up",
                "a round at least in between, which trains the experts",
                "raise rounds",
            )
        if gate.rounds and self.experts.slots > SHARES:
            yield (
                f"{what} with up to {self.experts.slots} experts",
                f"at most {SHARES}, each of whose shares is told",
                "lower method.experts.most",
            )
        if self.train.private.max_grad_norm:
            yield (
                f"{what} with method.train.private",
                "one of them: what a row does to a gate is not bounded",
                "leave one out",
            )
        if gate.depth and self.train.checkpointing:
            yield (
                "method.experts.gate.depth with method.train.checkpointing",
                "one of them: layers that are computed again would count twice",
                "leave one out",
            )
        if self.train.objective.refers:
            yield (
                f"{what} with method.train.objective.loss = '{self.train.objective.loss}'",
                "one that does not refer to the model without its adapter: experts would still be on it",
                "choose another objective, or leave [method.experts.gate] out",
            )

    def depends_on_rounds(self) -> list[str]:
        gate = self.experts.gate
        last = f"method.experts.gate.{'rounds' if gate.rounds else 'fit'}"
        return [*super().depends_on_rounds(), *([last] if gate.made else [])]


def refuse_merging(form: str) -> None:
    """Raises M306."""
    if form != "adapter":
        raise FedtuneError(
            "M306",
            f"--as {form} for a run with a gate, whose experts are mixed anew for every token",
            "--as adapter",
            "export it so, or write one expert with: fedtune experts export",
        )


def moves_a(rule: Rule) -> bool:
    """Whether factors A are trained, and travel, in some round."""
    pair = (f"a{A_END}", f"a{B_END}")
    return any(pair[0] in rule.trains(pair, number) for number in (1, 2))


def sums_up(rule: Rule) -> bool:
    return rule.linear and not rule.core and not rule.carries and not rule.stays([f"a{A_END}", f"a{B_END}"])


def hiding(recipe: Any) -> str:
    """A step of the chain that only a sum can undo."""
    steps = [step.build() for step in recipe.chain]
    return next((step.name for step in steps if step.undone == "sum" or step.hides), "")


class ExpertCosts(AdapterCosts):
    """As for any adapter, at the ranks of the general expert and of the one in training above it."""

    settings: ExpertsSettings

    def memory(self, plan: Plan, length: int) -> Mapping[str, int]:
        experts = self.settings.experts
        above = MOST if experts.rank == "auto" else 1
        if experts.gate.rounds:  # all experts stand on the network at once
            above = max(above, math.ceil(experts.slots * self.part(plan)))
        return super().memory(plan_at(plan, (1 + above) * self.settings.lora.rank), length)

    def part(self, plan: Plan) -> float:
        """Of all layers, those where an expert lives, on average over as many experts as there can be."""
        living = self.where(plan).living
        return sum(map(len, living.values())) / (len(living) * max(self.settings.experts.slots, 1))

    def where(self, plan: Plan) -> Where:
        """Who lives where, of as many experts as there can be."""
        return self.settings.experts.where(sizes_of(plan.shapes), self.settings.experts.slots)

    def remarks(self, recipe: object, labels: int, rows: float) -> list[str]:
        first = self.settings.experts.warm_up + 1
        return [
            f"experts   from round {first} on, members of a group train twice a round: the general expert, "
            "then their own; the bytes above are of such a round",
            *self.of_gate(recipe, labels),
        ]

    def of_gate(self, recipe: Any, labels: int) -> list[str]:
        gate, slots = self.settings.experts.gate, self.settings.experts.slots
        if gate.fit == "sums":
            sizes = sizes_of(self.plan(recipe.model, recipe.data.task, labels).shapes)
            width = min(gate.width, sum(size for size, _ in sizes.values()))
            up = 4 * (width + packed(width))
            return [
                f"gate      the last round also asks for sums: {up:,} bytes up, which are not counted above; "
                "afterwards each text goes through the model twice"
            ]
        if not gate.rounds:
            return []
        plan = self.plan(recipe.model, recipe.data.task, labels)
        where, sizes = self.where(plan), sizes_of(plan.shapes)
        living, rank = where.living, self.settings.lora.rank
        up = sum((len(living[layer]) + gate.null) * (sizes[layer][0] + 1) for layer in where.gated)
        pairs = sum(len(who) * rank * sum(sizes[layer]) for layer, who in living.items())
        down = plan.trainable + pairs + up
        return [
            f"gate      the last {gate.rounds} rounds train a gate alone: up to {4 * up:,} bytes up and "
            f"{4 * down:,} down, with {slots} experts, which every member is given"
        ]

"""The [method] table of type = "fedpeft", and which of its settings cannot go together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field

from fedtune.aggregate import RULES, Rule
from fedtune.methods.base import AdapterTable
from fedtune.methods.head_start import FROM_DATA, HeadStart
from fedtune.methods.lora_start import LoraStart, residual_rank, start_conflicts
from fedtune.methods.memory_ranks import SIZE
from fedtune.model.adapters import Lora
from fedtune.model.server_optimizers import ServerSettings, TakeMean
from fedtune.settings import path_below


class FedPEFTSettings(AdapterTable):
    """The keys of [method] type = "fedpeft"."""

    type: Literal["fedpeft"] = "fedpeft"
    own_loop: ClassVar[bool] = True
    start_from: str = ""
    """An adapter to begin with instead of a fresh one: the folder of a run, of an exported adapter, or of one
    that stock peft saved for
    the same base. Only the coordinator needs it."""
    lora_rank_by_client: Annotated[tuple[int, ...], Field(max_length=4096)] | Literal["auto"] = ()
    """Ranks of the clients, by number, in turns; adapter.rank is the server's. Empty: all have that one.
    auto: the greatest power of
    two up to adapter.rank whose training fits into the client's memory, chosen before the run begins;
    `fedtune check` says which and why."""
    memory_by_client: tuple[Annotated[str, Field(pattern=SIZE)], ...] = Field((), max_length=4096)
    """lora_rank_by_client = "auto": what clients have for model and training, by number, in turns, such as
    ["2 GiB", "900 MB"]; in a
    deployment, clients may report it instead. The process itself (Python, torch: about 0.5 GiB) comes on
    top."""
    lora_alpha_by_client: tuple[float, ...] = Field((), max_length=4096)
    """Alphas of the clients, by number, in turns; empty: in proportion to the rank, so that all have one
    scale."""
    lora_start: LoraStart = "zero"
    """How LoRA's factors begin. zero: A drawn, B at zero. pissa, olora: both as the greatest singular
    directions of the weight, or its first orthogonal ones, which a residual beside them takes away again, so
    that the base stays as everybody holds it; it doubles the way down and the rank of an export. eva: A as
    the directions in which a layer's inputs vary most, from clients' summed second moments, in one question.
    corda: both as the directions of the weight that those inputs use most, of the same question, with a
    residual as pissa's. All are computed once, by the coordinator."""
    server: ServerSettings = TakeMean()

    def located(self, place: Path) -> Self:
        return self.model_copy(update={"start_from": path_below(place, self.start_from)})

    @property
    def takes_turns(self) -> bool:
        return True

    @property
    def undecided(self) -> str:
        return "method.lora_rank_by_client" if self.lora_rank_by_client == "auto" else ""

    @property
    def provisional(self) -> FedPEFTSettings:
        return self.with_ranks(()) if self.undecided else self

    def with_ranks(self, ranks: Sequence[int]) -> FedPEFTSettings:
        """These ranks by client number, and no memory beside them."""
        return self.model_copy(update={"lora_rank_by_client": tuple(ranks), "memory_by_client": ()})

    @property
    def lora(self) -> Lora:
        """The adapter where its rank matters; `conflicts` has refused other kinds by then."""
        if not isinstance(self.adapter, Lora):
            raise TypeError(f"a '{self.adapter.kind}' adapter has no rank")
        return self.adapter

    @property
    def starts_head(self) -> HeadStart:
        """How the head starts; an adapter to start from brings its own."""
        return "random" if self.start_from else self.head_start

    def trains_alone(self, rule: Rule) -> str:
        if rule.carries or rule.core:
            return f"aggregate.rule = '{rule.rule}'"
        if self.mixed:
            return "clients of different ranks or alphas"
        if self.residual:
            return self.residual
        lora = self.adapter if isinstance(self.adapter, Lora) else None
        if not self.adapter.stacks or (lora and lora.own_steps):
            return f"method.adapter.kind = '{self.adapter.kind}'" + (" as it is set" if lora else "")
        return ""

    def rounds_well(self, rule: Rule) -> bool:
        """LoRA's factors are spread around zero. Scales around one, weights of the base, and what a rule lays
        on top exactly are not."""
        return isinstance(self.adapter, Lora) and not (rule.carries or rule.core)

    def needs_weights(self) -> str:
        return super().needs_weights() or self.residual

    @property
    def residual(self) -> str:
        return f"method.lora_start = '{self.lora_start}'" if residual_rank(self) else ""

    @property
    def mixed(self) -> bool:
        return bool(self.lora_rank_by_client or self.lora_alpha_by_client)

    def conflicts(self, recipe: Any) -> Iterator[tuple[str, str, str]]:
        rule: Rule = recipe.aggregate
        name = f"aggregate.rule = '{rule.rule}'"
        listed = () if self.lora_rank_by_client == "auto" else self.lora_rank_by_client
        if self.memory_by_client and self.lora_rank_by_client != "auto":
            yield (
                "method.memory_by_client without lora_rank_by_client = 'auto'",
                "both together",
                "remove it, or set lora_rank_by_client = 'auto'",
            )
        if any(rank < 1 for rank in listed) or any(not alpha > 0 for alpha in self.lora_alpha_by_client):
            yield (
                "a rank or alpha that is not positive",
                "ranks of 1 or more and alphas above 0",
                "correct method.lora_rank_by_client or lora_alpha_by_client",
            )
        if (rule.pairs or self.mixed) and self.adapter.kind != "lora":
            what = name if rule.pairs else "clients of different ranks"
            yield (
                f"{what} with method.adapter.kind = '{self.adapter.kind}'",
                "kind = 'lora'",
                "change one of them",
            )
        if self.mixed and not rule.mixed:
            known = ", ".join(sorted(tag for tag, other in RULES.items() if other.mixed))
            yield (
                f"clients of different ranks or alphas with {name}",
                f"one of {known}",
                "change aggregate.rule",
            )
        if (self.mixed or rule.carries) and recipe.downlink.remembers:
            yield (
                f"downlink.step = '{recipe.downlink.step}' with what {name} sends",
                "no [downlink]",
                "remove [downlink]",
            )
        if self.mixed and recipe.downlink.lossy:
            yield (
                f"downlink.step = '{recipe.downlink.step}' with clients of different ranks",
                "no [downlink]",
                "remove [downlink]",
            )
        if self.server.optimizer != "none" and not rule.steps:
            known = " or ".join(tag for tag, other in RULES.items() if other.steps)
            yield (
                f"method.server.optimizer = '{self.server.optimizer}' with {name}",
                known,
                "remove one of them",
            )
        if not recipe.partition.open_ended:
            yield from rule.limits(
                recipe.sampling.count or round(recipe.sampling.fraction * recipe.partition.clients)
            )
        if self.start_from and recipe.data.task == "preference" and self.train.objective.refers:
            yield (
                f"method.start_from with method.train.objective.loss = '{self.train.objective.loss}', whose "
                "reference is the model without any adapter",
                "a base that is the reference",
                "merge the adapter first (fedtune export RUN --for merged) and set model.name to that, or "
                "choose orpo or simpo",
            )
        if self.start_from and (rule.core or rule.carries):
            yield (
                f"method.start_from with {name}",
                "a rule whose state is the adapter alone",
                "change aggregate.rule",
            )
        if self.start_from and self.head_start in FROM_DATA:
            yield (
                f"method.head_start = '{self.head_start}' with method.start_from",
                "auto: an adapter brings its head",
                "remove one of them",
            )
        yield from super().conflicts(recipe)
        yield from start_conflicts(self, recipe)
        if self.train.weight_decay and rule.carries:
            yield (
                f"method.train.weight_decay with {name}",
                "no weight decay, because it would wear down what is carried over",
                "remove it",
            )

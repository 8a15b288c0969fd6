"""The [method] table of type = "fedkseed", and which of its settings cannot go together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple, Self

from pydantic import Field

from fedtune.methods.head_start import HeadStart, start_conflicts
from fedtune.methods.interface import MethodTable
from fedtune.methods.weights import Weight
from fedtune.model.adapters import Adapter, AdapterSettings, Full, Lora
from fedtune.model.objectives import Objective
from fedtune.model.rates import Rates, rate_conflicts, with_rates
from fedtune.model.settings import TrainSettings, adapter_conflicts, at_once, float16_conflicts

if TYPE_CHECKING:
    from fedtune.model.base import Base


class Found(NamedTuple):
    """What fits one kind of adapter: the rate of a walk, training before a projection, and its gain."""

    lr: float
    train: Rates
    gain: float = 1.0


# By seed 11 on a tuning split of CLINC150's domains (MiniLM, K = 4096). Of all weights a projection keeps so
# little of an update's length that a gain of 1 adds more noise than it takes.
FOUND = {
    "full": Found(1e-6, Rates(0.1, 0.5, 0.0, "sgd", matrices=False), 0.1),
    "lora": Found(1e-4, Rates(0.05, 0.5, 0.0, "sgd", matrices=False)),
    "bias": Found(1e-4, Rates(0.05, 0.5, 0.0, "sgd", matrices=False)),
    "head": Found(3e-3, Rates(2e-2, 2e-2, 0.0, matrices=False)),
}
OTHER = FOUND["lora"]


class ProjectSettings(TrainSettings):
    """[method.train] of type = "fedkseed": how a client with gradients trains before it projects."""

    optimizer: Literal["auto", "adamw", "sgd"] = "auto"
    """sgd puts most of an update's length where the loss falls; adamw spreads it over all weights, and a
    projection keeps K / d of a length. auto: sgd, but adamw for a head alone."""
    steps: int = Field(5, ge=0)
    """Optimiser steps per round; 0 means `epochs` passes instead."""


class FedKSeedSettings(MethodTable):
    """[method] type = "fedkseed"."""

    selector: ClassVar[str] = "space"
    type: Literal["fedkseed"] = "fedkseed"
    space: Literal["full", "adapter"] = "full"
    """full: every parameter of the model, or those of `only`; adapter: those of [method.adapter]."""
    only: tuple[str, ...] = ()
    """full: names of parameters to tune, shell patterns such as "*.layers.4.*"; the task head always is;
    empty means all."""
    pool: Literal["hadamard", "independent"] = "hadamard"
    """hadamard: orthogonal directions, rebuilt in one pass whatever their number; independent: one pass for
    each that was used."""
    directions: Literal["rademacher", "gaussian"] = "rademacher"
    """Signs, or (independent pool) normal numbers from an integer table."""
    size: int = Field(4096, ge=32, le=1 << 20)
    """K, the number of directions: a power of two."""
    refresh: int = Field(0, ge=0)
    """Rounds until a new pool; 0 keeps one. Every pool so far travels down: 4 K bytes each, and a pass over
    the weights to rebuild."""
    curvature: bool = False
    """Divide a parameter's steps by the root of what it has moved in finished pools (HiSo), which everybody
    knows. Experimental; 4 bytes a parameter."""
    estimator: Literal["auto", "spsa", "fzoo", "gradient"] = "auto"
    """spsa: two forward passes a step, the memory of inference; fzoo: one and a bit (experimental); gradient:
    [method.train], then projected; auto:
    gradient where memory allows, else spsa."""
    estimators: tuple[Literal["spsa", "gradient"], ...] = ()
    """What each client uses, by number, in turns; empty: all as `estimator`."""
    memory: tuple[float, ...] = ()
    """auto: GiB that each client has for training, by number, in turns; empty: half of what its machine or
    GPU has."""
    steps: int = Field(200, ge=1, le=1 << 16)
    """spsa, fzoo: scalars in a round, one for each direction that is tried."""
    group: int = Field(8, ge=2)
    """fzoo: directions that are tried from one point on one batch; each scalar is divided by the spread of
    their losses."""
    walk: Literal["moves", "table"] = "moves"
    """spsa, fzoo: how weights are changed at each step. moves: float32, in place; table: written anew from
    the first values, in their type, so that a bfloat16 base is walked in 4 bytes a parameter instead of 6.
    Another trajectory in its last bits."""
    batch: int = Field(8, ge=1)
    """spsa, fzoo: examples in a step."""
    lr: Literal["auto"] | Annotated[float, Field(gt=0)] = "auto"
    """spsa, fzoo: what a step moves the weights by, over the scalar; auto: what fits the kind of adapter."""
    eps: float = Field(1e-3, gt=0)
    """spsa, fzoo: how far along a direction the loss is taken."""
    bits: Literal[16, 1] = 16
    """Bits of a scalar. 1: its sign, so that lr is the length of a step (experimental)."""
    clip: float = Field(100.0, gt=0, le=32000)
    """Largest scalar. Its unit is the finest power of two that fits 16 bits; the server refuses what lies
    outside."""
    outside: Literal["clip", "drop"] = "clip"
    """What a client does with a scalar beyond the clip: cut it, or leave the step out."""
    importance: bool = False
    """FedKSeed-Pro: draw seeds by the mean size of their scalars so far. Mild: at most e times as often; K
    bytes more on the way down."""
    gain: Literal["auto"] | Annotated[float, Field(gt=0)] = "auto"
    """gradient: what an update's coordinates are multiplied by; 1 is unbiased, less is calmer where K is far
    below the number of parameters. auto: 0.1 for all parameters, else 1."""
    uplink: Literal["auto", "steps", "pool"] = "auto"
    """steps: each step's scalar, which the server reads; pool: K sums, which it adds; auto: steps where all
    clients use spsa."""
    weight: Weight = "rows"
    """As for fedpeft."""
    head_start: HeadStart = "auto"
    """As for fedpeft. The head's first values then travel
    too, once to each client that holds them."""
    guard: float = Field(2.0, ge=0)
    """Stop the run where a round's training loss is more than this times the first one, and by more than 1
    above it; 0 never does."""
    hold: bool = True
    """Clients keep the accumulators, so that only those that changed travel to them again; where they cannot,
    whole ones do."""
    adapter: AdapterSettings = Lora()
    train: ProjectSettings = ProjectSettings()

    @classmethod
    def unused(cls, table: Mapping[str, Any]) -> set[str]:
        return set() if table.get("space") == "adapter" else {"adapter"}

    def require(self, base: Base) -> None:
        from fedtune.model.packing import require

        require(self.train, base)

    def depends_on_rounds(self) -> list[str]:
        return self.train.depends_on_rounds()

    @property
    def objective(self) -> Objective:
        return self.train.objective

    @property
    def trained(self) -> Adapter:
        if self.space == "adapter":
            return self.adapter
        full = Full(only=self.only)
        return full.as_held() if self.walk == "table" and self.walks_only else full

    @property
    def found(self) -> Found:
        return FOUND.get(self.trained.kind, OTHER)

    @property
    def rates_open(self) -> bool:
        return "auto" in (self.lr, self.gain) or self.train.open

    @property
    def rates(self) -> str:
        walk = "" if self.estimator == "gradient" else f"walks at {self.lr}"
        train = "" if self.walks_only else f"gradients by {self.train.rates}, gain {self.gain}"
        return "; ".join(filter(None, (walk, train)))

    def with_rates(self, width: int) -> Self:
        known = self.found
        values = {
            "lr": known.lr if self.lr == "auto" else self.lr,
            "gain": known.gain if self.gain == "auto" else self.gain,
            "train": with_rates(self.train, known.train, width, self.head_start != "random", "sgd"),
        }
        return self.model_copy(update=values)

    def fitting_rates(self, width: int) -> str:
        open_ = {"lr": "auto", "gain": "auto", "train": ProjectSettings()}
        return self.model_copy(update=open_).with_rates(width).rates

    def at_once(self, clients: int) -> Self | None:
        return None if self.walks_only else self.model_copy(update={"train": at_once(self.train, clients)})

    @property
    def walks_only(self) -> bool:
        """Whether no client may use gradients."""
        return "gradient" not in self.estimators if self.estimators else self.estimator in ("spsa", "fzoo")

    @property
    def local_steps(self) -> int | None:
        return self.steps if self.walks_only else self.train.steps or None

    @property
    def sends_steps(self) -> bool:
        return self.uplink == "steps" or (self.uplink == "auto" and self.walks_only)

    def walking_conflicts(self) -> Iterator[tuple[str, str, str]]:
        objective = self.train.objective
        walks = "spsa" in self.estimators if self.estimators else self.estimator != "gradient"
        for key in ["uds", "curriculum"] if walks else []:
            if key in self.train.reads_otherwise:
                yield (
                    f"method.train.{key} with clients that walk",
                    "training with gradients",
                    f"set method.estimator = 'gradient', or remove [method.train.{key}]",
                )
        if walks and not objective.by_values:
            yield (
                f"method.train.objective.loss = '{objective.loss}' with clients that walk",
                "a loss whose value says which way is down",
                "set method.estimator = 'gradient', or choose another loss",
            )

    def table_conflicts(self) -> Iterator[tuple[str, str, str]]:
        here = "method.walk = 'table' with "
        if self.walk == "moves":
            return
        if self.estimator == "gradient" or set(self.estimators) == {"gradient"}:
            yield here + "clients that all use gradients", "clients that walk", "remove it"
        if self.pool != "hadamard":
            yield (
                f"{here}method.pool = '{self.pool}'",
                "pool = 'hadamard', of which every sum is a table",
                "leave method.pool out, or set method.walk = 'moves'",
            )
        if self.refresh:  # and so no curvature, which needs it
            yield (
                f"{here}method.refresh = {self.refresh}",
                "one pool for the whole run, because each has a table of its own",
                "set method.refresh = 0, or method.walk = 'moves'",
            )

    def conflicts(self, recipe: Any) -> Iterator[tuple[str, str, str]]:
        yield from rate_conflicts(self.train, self.trained.kind, self.found.train)
        yield from adapter_conflicts(self.train, self.trained)
        yield from self.walking_conflicts()
        if self.size & (self.size - 1):
            yield f"method.size = {self.size}", "a power of two", "set it to 1024, 4096 or 65536"
        if self.directions == "gaussian" and self.pool == "hadamard":
            yield (
                "method.directions = 'gaussian' with method.pool = 'hadamard'",
                "directions = 'rademacher'",
                "set method.pool = 'independent'",
            )
        if self.space == "full" and "adapter" in self.model_fields_set:
            yield (
                "[method.adapter] with method.space = 'full'",
                "method.space = 'adapter'",
                "remove one of them",
            )
        if self.space == "adapter" and self.only:
            yield "method.only with method.space = 'adapter'", "method.space = 'full'", "remove it"
        if self.uplink == "steps" and not self.walks_only:
            yield (
                "method.uplink = 'steps' with clients that use gradients",
                "uplink = 'pool'",
                "set method.estimator = 'spsa', or leave uplink out",
            )
        if self.importance and not self.sends_steps:
            yield (
                "method.importance where the server does not read scalars",
                "uplink = 'steps'",
                "set method.estimator = 'spsa'",
            )
        if self.importance and self.refresh:
            yield (
                f"method.importance with method.refresh = {self.refresh}",
                "a pool that lasts for the whole run",
                "remove one of them",
            )
        if self.bits == 1 and not self.walks_only:
            yield (
                "method.bits = 1 with clients that use gradients",
                "bits = 16",
                "set method.estimator = 'spsa'",
            )
        if self.bits == 1 and {"clip", "outside"} & self.model_fields_set:
            yield (
                "method.clip or method.outside with method.bits = 1",
                "neither, because a sign has no size",
                "remove them",
            )
        if self.bits == 1 and self.estimator == "fzoo":
            yield (
                "method.bits = 1 with method.estimator = 'fzoo'",
                "bits = 16, because fzoo needs sizes, not signs",
                "remove one of them",
            )
        if self.estimator == "fzoo" and self.steps % self.group:
            yield (
                f"method.steps = {self.steps} in groups of {self.group}",
                "whole groups",
                f"set steps = {-(-self.steps // self.group) * self.group}",
            )
        if self.estimator != "fzoo" and "group" in self.model_fields_set:
            yield "method.group without method.estimator = 'fzoo'", "estimator = 'fzoo'", "remove it"
        if self.curvature and not self.refresh:
            yield (
                "method.curvature with one pool for the whole run",
                "pools that end after some rounds",
                "set method.refresh = 1",
            )
        if self.curvature and not self.walks_only:
            yield (
                "method.curvature with clients that use gradients",
                "estimator = 'spsa' or 'fzoo'",
                "set method.estimator = 'spsa'",
            )
        yield from self.table_conflicts()
        if self.estimators and self.estimator != "auto":
            yield "both method.estimator and method.estimators", "one of them", "remove one"
        if self.memory and (self.estimators or self.estimator != "auto"):
            yield "method.memory without method.estimator = 'auto'", "estimator = 'auto'", "remove it"
        yield from start_conflicts(self.head_start, recipe)
        if not self.walks_only:
            yield from float16_conflicts(recipe)
        if others := [step.step for step in recipe.chain if step.step not in ("ring", "mask")]:
            yield (
                f"[[chain]] step = '{others[0]}' with method.type = 'fedkseed'",
                "none but 'ring' and 'mask', because whole numbers are sent as they are",
                "remove it",
            )
        if recipe.chain and self.sends_steps:
            yield (
                f"[[chain]] step = '{recipe.chain[-1].step}' with the scalars of each client's own steps",
                "sums over a pool of seeds, which can be added",
                "set method.uplink = 'pool'",
            )
        if recipe.aggregate.rule != "mean":
            yield (
                f"aggregate.rule = '{recipe.aggregate.rule}' with method.type = 'fedkseed'",
                "rule = 'mean', because the server adds whole numbers",
                "remove [aggregate]",
            )
        if recipe.downlink.lossy:
            yield (
                f"downlink.step = '{recipe.downlink.step}' with method.type = 'fedkseed'",
                "no [downlink], because accumulators must arrive exactly",
                "remove it",
            )

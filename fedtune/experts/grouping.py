"""[method.experts]: who shares an expert. A way of grouping is one class, registered by its place in
`ExpertSettings`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from fedtune.experts.cluster import Directions, clusters, matched, nearest
from fedtune.experts.feed_forward import Sizes
from fedtune.experts.gate_table import GateTable
from fedtune.experts.shapes import Shape, Where, Within, where
from fedtune.settings import Settings

Groups = Mapping[str, tuple[int, ...]]  # id of an expert -> its clients, ascending
GroupName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,31}$|^$")]
MIXLORA = {"per": "block", "keep": "topk", "k": 2, "prefix": False, "balance": 0.01}  # keys of the gate


class Grouping(Settings):
    """What all ways share.

    asks    clients are asked for a sketch of where their rows move the model
    single  an expert may be one client's own
    """

    asks: ClassVar[bool] = False
    single: ClassVar[bool] = False
    by: str
    warm_up: int = Field(2, ge=1)
    """Rounds at the beginning in which there is only the general expert."""
    min_clients: int = Field(3, ge=2)
    """Clients that an expert is summed over at least, in every round; members of smaller groups have the
    general expert alone."""
    rank: Literal["equal", "auto"] = "equal"
    """Ranks of experts: equal, as method.adapter.rank; or auto: from one round of training on, more for
    groups whose sums have more directions, at most twice that, and as much in all (not under the rule
    ffa)."""
    inputs: bool = True
    """In the last round, groups also sum up means and mean squares of what comes into each adapted layer, by
    which a router knows whose rows a text is like (not under the rule ffa)."""

    shape: Shape = "whole"
    """How many experts live in a block of the network, by its depth (MoLA, Gao et al. 2024,
    arXiv:2402.08562), of eight in each quarter from the input up: triangle 8-6-4-2, inverted 2-4-6-8,
    hourglass 8-2-2-8, diamond 2-8-8-2, rectangle 5-5-5-5. Blocks take turns, so that experts have the same
    number of blocks, give or take one. whole: all in every block."""

    within: Within = "all"
    """Where experts have pairs: in all adapted layers, or in feed-forward blocks alone. The general expert
    has its own in all."""
    preset: Literal["none", "mixlora"] = "none"
    """mixlora: experts of feed-forward blocks behind one gate each (Li et al. 2024, arXiv:2404.15159). Sets
    within = "feed-forward" and in [method.experts.gate] per = "block", keep = "topk", k = 2, prefix = false,
    balance = 0.01, each where the recipe does not say it."""

    gate: GateTable = GateTable()

    @model_validator(mode="before")
    @classmethod
    def of_preset(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("preset") == "mixlora":
            gate = given.get("gate", {})
            gate = MIXLORA | gate if isinstance(gate, dict) else gate
            return {"within": "feed-forward", **given, "gate": gate}
        return given

    def where(self, sizes: Sizes, experts: int) -> Where:
        """Who lives where, of so many experts. Raises M306."""
        return where(sizes, experts, self.shape, self.fewest, self.within, self.gate.per)

    @property
    def least(self) -> int:
        return self.min_clients

    @property
    def slots(self) -> int:
        """Experts at most."""
        raise NotImplementedError

    def names(self, groups: Groups) -> tuple[str, ...]:
        """Ids of all experts, ascending, once groups are known."""
        return tuple(sorted(groups))

    @property
    def fewest(self) -> int:
        """Experts in a block at least: a single one would be asked for everything, unless nobody can be."""
        return 1 if self.gate.null else 2

    def due(self, number: int) -> bool:
        """Whether all members of this round are asked for sketches, and grouped anew."""
        return False

    def of(self, client: int, groups: Groups) -> str:
        """A client's expert, "" for none."""
        return next((name for name, members in groups.items() if client in members), "")

    def regroup(
        self, directions: Directions, groups: Groups, made: int
    ) -> tuple[dict[str, tuple[int, ...]], int]:
        """Groups from all sketches, and how many experts there have been."""
        return dict(groups), made

    def joined(self, client: int, directions: Directions, groups: Groups) -> str:
        """The expert of a client whose sketch came after the grouping."""
        return ""


class Given(Grouping):
    """by = "given": the recipe says each client's group, such as its department or language."""

    by: Literal["given"] = "given"
    # not strict: `of_preset` makes Python's lists of JSON's
    groups: Annotated[tuple[GroupName, ...], Field(min_length=1, max_length=4096, strict=False)]
    """Names of the clients' groups, by number, in turns; "" has the general expert alone."""

    @property
    def slots(self) -> int:
        return len(self.names({}))

    def names(self, groups: Groups) -> tuple[str, ...]:
        return tuple(sorted(set(self.groups) - {""}))

    def of(self, client: int, groups: Groups) -> str:
        return self.groups[client % len(self.groups)]


class Clusters(Grouping):
    """by = "clusters": clients whose rows move the general expert in like directions share an expert."""

    asks: ClassVar[bool] = True
    by: Literal["clusters"] = "clusters"
    most: int = Field(8, ge=2, le=256)
    """Experts at most."""
    sketch: int = Field(1024, ge=16, le=65536)
    """Numbers in a client's sketch."""
    noise: float = Field(0.0, ge=0)
    """Deviation of Gaussian noise on each number of a sketch, whose length is 1. Drawn from the system's
    secrets at the client, so that a run with noise is not repeatable."""
    recluster_every: int = Field(0, ge=0)
    """Rounds between groupings; 0 groups once. Clients that come later join the nearest group."""
    hysteresis: float = Field(0.05, ge=0, le=1)
    """A client changes its expert only where the cosine with the other group's centre is greater by this."""

    @property
    def slots(self) -> int:
        return self.most

    def due(self, number: int) -> bool:
        since = number - self.warm_up - 1
        return since == 0 or bool(self.recluster_every and since > 0 and since % self.recluster_every == 0)

    def regroup(
        self, directions: Directions, groups: Groups, made: int
    ) -> tuple[dict[str, tuple[int, ...]], int]:
        found = clusters(directions, self.most, self.least)
        names, named = matched(found, groups), dict[str, list[int]]()
        for name, members in zip(names, found, strict=True):
            if not name:
                name, made = f"e{made}", made + 1
            named[name] = list(members)
        self.stay(named, directions, groups)
        return {
            name: tuple(sorted(members))
            for name, members in sorted(named.items())
            if len(members) >= self.least
        }, made

    def stay(self, named: dict[str, list[int]], directions: Directions, groups: Groups) -> None:
        """Hysteresis: who is hardly nearer to the new group goes back to the old one."""
        moves = [
            (client, before, now)
            for now, members in named.items()
            for client in members
            if (before := next((n for n, old in groups.items() if client in old), now)) != now
            and before in named
        ]
        for client, before, now in sorted(moves):
            others = {
                name: [directions[one] for one in members if one != client] for name, members in named.items()
            }
            near = nearest(directions[client], {name: held for name, held in others.items() if held})
            if near[now] - near[before] < self.hysteresis:
                named[now].remove(client)
                named[before].append(client)

    def joined(self, client: int, directions: Directions, groups: Groups) -> str:
        known = {
            name: [directions[one] for one in members if one in directions]
            for name, members in groups.items()
        }
        near = nearest(directions[client], {name: held for name, held in known.items() if held})
        best = max(sorted(near), key=lambda name: near[name], default="")
        return best if best and near[best] > 0 else ""


class Clients(Grouping):
    """by = "clients": every client has an expert of its own. The server then reads single answers."""

    single: ClassVar[bool] = True
    by: Literal["clients"] = "clients"

    @property
    def least(self) -> int:
        return 1

    @property
    def slots(self) -> int:
        return 0  # nobody knows: it has no gate

    def conflicts(self, recipe: Any) -> Iterator[tuple[str, str, str]]:
        if "min_clients" in self.model_fields_set:
            yield (
                "method.experts.min_clients with method.experts.by = 'clients'",
                "experts of one client each",
                "remove it, or set method.experts.by = 'clusters'",
            )

    def of(self, client: int, groups: Groups) -> str:
        return f"client-{client}"


ExpertSettings = Annotated[Clusters | Given | Clients, Field(discriminator="by")]


def direction_of(given: Mapping[str, np.ndarray], trained: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Where training moved the B factors."""
    return {name: trained[name] - given[name] for name in given if name.endswith(".lora_B.weight")}

"""[method.experts.gate]: a gate over all experts of a run, once they stand still."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fedtune.settings import Settings

OF_SUMS = frozenset({"width"})
OF_STEPS = frozenset({"rounds", "null", "prefix", "per", "balance", "localized", "owner", "depth", "lr"})


class GateTable(Settings):
    """A linear gate over all experts, made at the end of a run."""

    rounds: int = Field(0, ge=0)
    """steps: so many of the run's last rounds train the gate, and nothing else; 0: there is none. Where fewer
    than two experts have been found there is nothing to choose from, and these rounds are as all others."""
    fit: Literal["steps", "sums"] = "steps"
    """steps: a gate at each adapted layer, which starts from the groups' mean inputs and is trained by all
    clients, each on its own rows; the gate's weights alone travel up. sums: in the run's last round groups
    also sum up what comes into all layers of the general expert, and the gate is the linear discriminant of
    these sums; whom a token asks is decided once for all layers, in a pass of the general expert that goes
    ahead."""
    width: int = Field(1024, ge=16, le=4096)
    """sums: numbers w to which what comes into all layers is folded; w (w + 3) / 2 travel up, once."""
    keep: Literal["topk", "topp", "dense"] = "topk"
    """Which experts have a say of a token: the `k` best; the best until their shares add up to `p`; or
    all."""
    k: int = Field(2, ge=2, le=256)
    """topk: how many. Shares of those that are kept add up to 1, so that one alone would teach a gate
    nothing."""
    p: float = Field(0.6, gt=0, le=1)
    """topp: what the shares of those that are kept add up to at least."""
    null: bool = False
    """An expert that does nothing, beside the others: its share is the general expert's alone."""
    prefix: bool = True
    """Scores are averaged over the text so far, as a gate of mean inputs needs; false: each token's own."""
    per: Literal["layer", "block"] = "layer"
    """Whom a token asks is decided at each layer; or once for each feed-forward block, from what comes into
    the block, and what experts answer is mixed behind it (experts within = "feed-forward")."""
    balance: float = Field(0.0, ge=0)
    """Weight of the Switch Transformer's load balance (Fedus et al. 2022, eq. 4). On rows of one kind it
    works against experts that differ: 0.01 and less, and for clients of mixed rows."""
    localized: float = Field(0.0, ge=0)
    """Weight of LoRAMoE's localised balance (Dou et al. 2024, arXiv:2312.09979), which leaves a group's own
    expert a greater share. Members are then told which expert that is; whoever has none is spared the
    term."""
    owner: float = Field(0.0, ge=0)
    """Weight of the cross entropy of a group's own expert among the shares, mean over tokens and layers: the
    gate is told whose rows these are, and does not have to find out from the loss alone. Members are then
    told which expert is theirs; whoever has none is spared the term."""
    depth: bool = False
    """Scores are also averaged over the layers so far, so that a layer decides by all that was seen below."""
    lr: float = Field(0.01, gt=0, le=100)
    """Learning rate of the gate; all else is as [method.train] says."""

    @property
    def made(self) -> bool:
        """Whether a run ends with a gate."""
        return self.fit == "sums" or bool(self.rounds)

    @property
    def out_of_place(self) -> list[str]:
        """Keys that the recipe says and this way of making a gate has no use for."""
        return sorted(self.model_fields_set & (OF_STEPS if self.fit == "sums" else OF_SUMS))

    @property
    def tells_own(self) -> bool:
        """Whether members are told which expert is their group's."""
        return bool(self.localized or self.owner)

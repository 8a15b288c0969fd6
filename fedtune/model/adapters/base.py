"""What every kind of adapter is: a table of settings that puts itself on a model. No torch at import."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from fedtune.settings import Settings

if TYPE_CHECKING:
    from torch import nn

    from fedtune.model.base import Base

    Named = dict[str, nn.Parameter]


class Adapter(Settings):
    """[method.adapter]: what is trained. The task head always travels with it.

    merges   whether a merged model can be exported: the kind adds no layers and no tokens
    caches   whether the adapter lives in the model's cache of keys and values
    has_encoder  whether its tokens come from a network of its own, of which peft's file keeps what it says
                 and not the network
    switches_off whether the network can be asked without it while it is there
    sparse   whether it trains chosen positions of weights, which every party derives from the base
    stacks   whether several clients' tensors fit into one pass (fedtune/model/stacked.py)
    keeps_types  whether what it trains keeps the base's type, and is not made float32
    beside   whether it neither trains nor reads weights of the base's linear layers, which may then be held
             in 4 or 8 bits (model.load)
    """

    kind: str
    merges: ClassVar[bool] = False
    caches: ClassVar[bool] = False
    has_encoder: ClassVar[bool] = False
    switches_off: ClassVar[bool] = False
    sparse: ClassVar[bool] = False
    stacks: ClassVar[bool] = False
    beside: ClassVar[bool] = False

    @property
    def virtual_tokens(self) -> int:
        """Tokens that the kind puts before every text."""
        return 0

    @property
    def keeps_types(self) -> bool:
        return False

    @property
    def keeps_front(self) -> bool:
        """Whether what the frozen blocks in front say of a row is computed once."""
        return False

    def turn(self, names: Iterable[str], number: int) -> frozenset[str]:
        """Which of what is trained has its turn in a round."""
        return frozenset(names)

    def attach(self, base: Base) -> tuple[Any, Named]:
        """Put the adapter on the base's network: the network to call, and the tensors to train by name.

        Names are those of peft's own adapter file where peft has the kind, the network's own names otherwise.
        Draws come from
        torch's generator, which the caller has seeded. Raises M302, M306.
        """
        raise NotImplementedError(f"kind '{self.kind}' cannot be attached")


Share = Annotated[float, Field(ge=0, le=1)]
WHOLE = (0.0, 1.0)  # the band of all blocks


def band_conflicts(band: tuple[float, float]) -> Iterator[tuple[str, str, str]]:
    """For a table's `conflicts`."""
    if band[0] >= band[1]:
        yield f"method.adapter.band = [{band[0]:g}, {band[1]:g}]", "from less to more", "correct it"


def front_conflicts(recipe: Any) -> Iterator[tuple[str, str, str]]:
    """The same of `keep_front`, for every kind that has it."""
    here = "method.adapter.keep_front"
    if recipe.data.task in ("preference", "image-classify"):
        yield f"{here} with data.task = '{recipe.data.task}'", "single texts", f"set {here} = false"


class LayerAdapter(Adapter):
    """A kind that stands beside chosen linear layers."""

    targets: tuple[str, ...] = ("all-linear",)
    """Names of modules, or all-linear."""
    last: int = Field(0, ge=0)
    """Adapt the last so many blocks only, which also ends the backward pass there; 0 means all."""
    band: tuple[Share, Share] = WHOLE
    """Adapt the blocks of this part of the depth only, counted from the input. [0.25, 0.5] is CoFiTune's, for
    up_proj and down_proj (Zhang et al. 2024, arXiv:2404.10306)."""
    keep_front: bool = False
    """With `last` or `band`: what the blocks in front of the adapted ones say of a row is computed once,
    without their dropout, and every step begins behind them, at the cost of the adapted blocks alone. Takes
    4 bytes x width of memory for each token of a client's rows."""
    modules_to_save: tuple[str, ...] = ()
    """Modules beside the task head that are trained whole and travel, by the ends of their names, such as
    "embed_tokens"."""

    @property
    def keeps_front(self) -> bool:
        return self.keep_front

    def conflicts(self, recipe: Any) -> Iterator[tuple[str, str, str]]:
        yield from band_conflicts(self.band)
        if self.last and self.band != WHOLE:
            yield "method.adapter.last with method.adapter.band", "one of them", "remove one"
        if self.keep_front:
            yield from self.front_conflicts(recipe)

    def front_conflicts(self, recipe: Any) -> Iterator[tuple[str, str, str]]:
        here = "method.adapter.keep_front"
        if not self.last and not self.band[0]:
            found = f"{here} with an adapter in the first block"
            yield found, "method.adapter.last, or a band that begins later", f"set {here} = false"
        if self.modules_to_save:
            yield f"{here} with method.adapter.modules_to_save", "one of them", "remove one"
        yield from front_conflicts(recipe)


class SparseAdapter(LayerAdapter):
    """A kind that trains chosen weights of linear layers."""

    merges: ClassVar[bool] = True
    switches_off: ClassVar[bool] = True
    sparse: ClassVar[bool] = True
    rank: int = Field(8, ge=1)
    """As many weights of a layer as LoRA of this rank has: rank x (inputs + outputs)."""


class PromptAdapter(Adapter):
    """A kind that learns tokens before the text."""

    beside: ClassVar[bool] = True
    tokens: int = Field(10, ge=1)
    """Virtual tokens."""

    @property
    def virtual_tokens(self) -> int:
        return self.tokens

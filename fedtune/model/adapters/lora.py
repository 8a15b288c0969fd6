"""Low-rank adaptation, by peft."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from fedtune.model.adapters.base import LayerAdapter

if TYPE_CHECKING:
    from fedtune.model.adapters.base import Named
    from fedtune.model.base import Base


class Lora(LayerAdapter):
    """kind = "lora": a low-rank update beside chosen linear layers (Hu et al. 2021, arXiv:2106.09685)."""

    kind: Literal["lora"] = "lora"
    beside: ClassVar[bool] = True
    merges: ClassVar[bool] = True
    switches_off: ClassVar[bool] = True
    stacks: ClassVar[bool] = True
    rank: int = Field(8, ge=1)
    """Rank r."""
    alpha: float = Field(16.0, gt=0)
    """The update is scaled by alpha/rank (alpha/sqrt(rank) with rslora)."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout before A."""
    rslora: bool = False
    """Rank-stabilised scale."""
    dora: bool = False
    """Weight-decomposed (DoRA)."""
    lr_ratio: float = Field(1.0, ge=1, le=1000)
    """LoRA+: B's learning rate over A's (Hayou et al. 2024, arXiv:2402.12354, who take 16 with an lr of about
    half the usual one). 1: the same."""
    projected: bool = False
    """LoRA-FA's optimiser, where A rests (aggregate.rule = "ffa"; of "rolora", the rounds of B): B's gradient
    becomes the one whose step is nearest to full tuning's (Zhang et al. 2023, arXiv:2308.03303)."""

    slices: int = Field(1, ge=1)
    """MoSA: a step trains one slice of the rank out of so many, drawn, and leaves the others as they are
    (Zhang et al. 2023, arXiv:2312.02923); all of the adapter travels. 1: the whole rank."""

    @property
    def own_steps(self) -> bool:
        """Whether a client has to take its steps by itself, rather than in one pass with others."""
        return bool(self.dora or self.modules_to_save or self.projected or self.slices > 1)

    def conflicts(self, recipe: Any) -> Iterator[tuple[str, str, str]]:
        yield from super().conflicts(recipe)
        method = recipe.method.model_dump()
        beside = [
            f"method.{key}"
            for key in ("lora_rank_by_client", "lora_start", "experts")
            if method.get(key) not in (None, (), "zero", "eva")
        ]
        if self.slices != 1:
            yield from self.slice_conflicts(recipe, beside)
        if self.projected:
            yield from self.projection_conflicts(recipe, beside)

    def projection_conflicts(self, recipe: Any, beside: list[str]) -> Iterator[tuple[str, str, str]]:
        here = "method.adapter.projected"
        a, b = "blocks.0.x.lora_A.weight", "blocks.0.x.lora_B.weight"
        if a in recipe.aggregate.trains((a, b), 1) or b not in recipe.aggregate.trains((a, b), 1):
            found = f"{here} with aggregate.rule = '{recipe.aggregate.rule}'"
            yield found, "a rule under which B alone is trained", "set aggregate.rule = 'ffa'"
        for other in [*beside, *(["method.adapter.dora"] if self.dora else [])]:
            yield f"{here} with {other}", "plain pairs with nothing beside them", "remove one"

    def slice_conflicts(self, recipe: Any, beside: list[str]) -> Iterator[tuple[str, str, str]]:
        found = f"method.adapter.slices = {self.slices}"
        if self.rank % self.slices:
            yield f"{found} of rank {self.rank}", "slices of one size", "choose a divisor of the rank"
        carried = [f"aggregate.rule = '{recipe.aggregate.rule}'"] if recipe.aggregate.carries else []
        for other in [*beside, *carried, *(["method.adapter.projected"] if self.projected else [])]:
            yield f"{found} with {other}", "pairs with nothing beside them, of one rank", "remove one"

    def attach(self, base: Base) -> tuple[Any, Named]:
        """A is Kaiming-uniform from the seed, B is zero: the first state is the base itself."""
        import peft

        from fedtune.model.adapters.layers import target_layers
        from fedtune.model.adapters.wrap import peft_arguments, with_peft

        return with_peft(
            base,
            peft.LoraConfig(
                r=self.rank,
                lora_alpha=self.alpha,
                lora_dropout=self.dropout,
                target_modules=target_layers(base, self),
                use_rslora=self.rslora,
                use_dora=self.dora,
                **peft_arguments(base, self.modules_to_save),
            ),
        )

"""The [method] table of type = "offsite", and which of its settings cannot go together."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import Field

from fedtune.errors import FedtuneError
from fedtune.methods.fedpeft_settings import FedPEFTSettings
from fedtune.model.adapters import Full, LayerAdapter
from fedtune.model.distil_settings import Distil
from fedtune.settings import path_below


class OffsiteSettings(FedPEFTSettings):
    """The keys of [method] type = "offsite"."""

    type: Literal["offsite"] = "offsite"  # type: ignore[assignment]
    own_loop: ClassVar[bool] = False  # of a model that the client does not have
    first: int = Field(2, ge=0)
    """Blocks at the model's beginning that clients train."""
    last: int = Field(2, ge=0)
    """Blocks at the model's end that clients train."""
    keep: float = Field(0.5, gt=0, le=1)
    """Share of the blocks between them that the emulator keeps, at even distances."""
    bits: Literal[0, 4, 8] = 0
    """Bits of a number in the matrices of those; 0 leaves them as they are."""
    distil: Distil = Distil()
    full: bool = False
    """Also train the same adapter in all blocks of the model itself, on all rows in one place: what offsite
    tuning is measured against. Costs a training of the whole model."""

    @property
    def public(self) -> str:
        return self.distil.data

    def located(self, place: Path) -> Self:
        distil = self.distil.model_copy(update={"data": path_below(place, self.distil.data)})
        return super().located(place).model_copy(update={"distil": distil})

    def kept(self, blocks: int) -> tuple[int, ...]:
        """The blocks that the emulator of a model of so many has: the ends, and of those between as many as
        `keep` says, at even distances, the outermost among them (as in the paper's code). Raises S721.

        >>> OffsiteSettings(first=1, last=2, keep=0.4).kept(12)
        (0, 1, 4, 6, 9, 10, 11)
        """
        between = blocks - self.first - self.last
        ends = f"method.first = {self.first} and method.last = {self.last} of a model of {blocks} blocks"
        if between < 1:
            found = f"{ends}, which overlap" if between < 0 else f"{ends}, which leave nothing between them"
            raise FedtuneError("S721", found, "a block between the ends", "lower method.first or method.last")
        count = round(self.keep * between)
        if not count:
            raise FedtuneError(
                "S721",
                f"method.keep = {self.keep:g} of {between} blocks, an emulator without any",
                f"at least one of them: a share of {1 / between:.2g} or more",
                "raise method.keep",
            )
        stride = (between - 1) / (count - 1) if count > 1 else 0.0
        middle = [round(number * stride) for number in range(count)] if count > 1 else [between // 2]
        return (
            *range(self.first),
            *(self.first + number for number in middle),
            *range(blocks - self.last, blocks),
        )

    def trained(self, blocks: int) -> frozenset[int]:
        """Of a network of so many blocks, the numbers of those at the ends."""
        return frozenset({*range(self.first), *range(blocks - self.last, blocks)})

    def needs_weights(self) -> str:
        return f"method.type = '{self.type}'"  # its emulator is made of them

    def conflicts(self, recipe: Any) -> Iterator[tuple[str, str, str]]:
        here = "with method.type = 'offsite'"
        if not self.first and not self.last:
            yield "method.first = 0 and method.last = 0", "a block to train", "raise one of them"
        if not isinstance(self.adapter, (LayerAdapter, Full)) or self.adapter.sparse:
            yield (
                f"method.adapter.kind = '{self.adapter.kind}' {here}",
                "a kind whose tensors stand in single blocks: lora, ia3, full",
                "choose another method.adapter.kind",
            )
        for key in ("last", "band"):
            field = type(self.adapter).model_fields.get(key)
            if field is None or getattr(self.adapter, key) == field.default:
                continue
            yield (
                f"method.adapter.{key} {here}",
                "method.first and method.last, which say what is trained",
                "remove it",
            )
        if self.keep == 1 and not self.bits:
            yield (
                f"method.keep = 1 without method.bits {here}",
                "an emulator that is not the model itself",
                "lower method.keep, set method.bits, or choose method.type = 'fedpeft'",
            )
        if recipe.data.task == "preference":
            yield (
                f"data.task = 'preference' {here}",
                "a client that holds the model: an emulator is no judge of how likely responses are",
                "set method.type = 'fedpeft'",
            )
        if self.start_from:
            yield (
                f"method.start_from {here}",
                "a fresh adapter, because one that was trained is not of the emulator's blocks",
                "remove it",
            )
        if self.lora_rank_by_client == "auto":
            yield (
                f"method.lora_rank_by_client = 'auto' {here}",
                "ranks in numbers: a client's memory would be counted for the whole model",
                "write the ranks",
            )
        yield from super().conflicts(recipe)

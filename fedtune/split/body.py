"""What the service demands of the frozen blocks, and a part of a model as such a body."""

from __future__ import annotations

from typing import Protocol

import torch

from fedtune.split.cut import Side
from fedtune.split.parts import Part


class Body(Protocol):
    """The frozen blocks. Both functions take float32 on the CPU and give float32 on the device that computed
    it, where it is coded for its way back, (examples, tokens, width); they keep nothing.

    Rows must not change one another: the service puts micro-batches of several clients into one pass.
    """

    def forward(self, hidden: torch.Tensor, side: Side) -> torch.Tensor:
        """The output of the last block."""

    def backward(self, hidden: torch.Tensor, side: Side, grad: torch.Tensor) -> torch.Tensor:
        """The gradient at `hidden`, given that at the output; the forward is computed again."""


class Frozen:
    """A Part that holds a body, on its own device and in its own type."""

    def __init__(self, part: Part, blockwise: bool = False) -> None:
        """blockwise: a backward keeps the activations of one block at a time instead of all, for one more
        forward."""
        self.part, self.blockwise = part, blockwise

    def forward(self, hidden: torch.Tensor, side: Side) -> torch.Tensor:
        with torch.no_grad():
            return self.part.body(self.there(hidden), self.beside(side)).float()

    def backward(self, hidden: torch.Tensor, side: Side, grad: torch.Tensor) -> torch.Tensor:
        return self.part.body_backward(
            self.there(hidden), self.beside(side), self.there(grad), self.blockwise
        ).float()

    def there(self, value: torch.Tensor) -> torch.Tensor:
        return value.to(self.part.device, self.part.dtype)

    def beside(self, side: Side) -> Side:
        return Side(
            *(None if value is None else value.to(self.part.device) for value in (side.mask, side.positions))
        )

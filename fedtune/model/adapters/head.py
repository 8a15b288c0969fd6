"""The task head alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from fedtune.model.adapters.base import Adapter, front_conflicts

if TYPE_CHECKING:
    from fedtune.model.adapters.base import Named
    from fedtune.model.base import Base


class Head(Adapter):
    """kind = "head": the task head alone; for language models the output layer, if it is not tied to the
    embeddings."""

    kind: Literal["head"] = "head"
    beside: ClassVar[bool] = True
    merges: ClassVar[bool] = True
    stacks: ClassVar[bool] = True
    keep_front: bool = False
    """What the frozen blocks say of a row is computed once, without their dropout, and every step begins
    behind them. Takes 4 bytes x width of memory for each token of a client's rows."""

    @property
    def keeps_front(self) -> bool:
        return self.keep_front

    def conflicts(self, recipe: Any) -> Iterator[tuple[str, str, str]]:
        if self.keep_front:
            yield from front_conflicts(recipe)

    def attach(self, base: Base) -> tuple[Any, Named]:
        from fedtune.model.adapters.layers import head_parameters, open_for_training, unfit
        from fedtune.types import LM_TASKS

        if base.task not in LM_TASKS:
            return base.net, head_parameters(base)
        output = base.net.get_output_embeddings()
        if output.weight is base.net.get_input_embeddings().weight:
            raise unfit(
                base,
                self.kind,
                "an output layer of its own (here it is tied to the embeddings)",
                "choose another method.adapter.kind",
            )
        own = {id(value) for value in output.parameters()}
        return base.net, open_for_training(
            base, {name for name, value in base.weights.items() if id(value) in own}
        )

"""The network's own parameters."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import PrivateAttr

from fedtune.errors import FedtuneError
from fedtune.model.adapters.base import WHOLE, Adapter, Share, band_conflicts

if TYPE_CHECKING:
    from fedtune.model.adapters.base import Named
    from fedtune.model.base import Base


class Full(Adapter):
    """kind = "full": every parameter, or those that a pattern names; costs a float32 copy of them while
    attached."""

    kind: Literal["full"] = "full"
    merges: ClassVar[bool] = True
    only: tuple[str, ...] = ()
    """Names of parameters, shell patterns such as "*.layers.4.*"; the task head is always trained; empty
    means all."""
    band: tuple[Share, Share] = WHOLE
    """Of these, only what is in the blocks of this part of the depth, counted from the input, such as
    [0.25, 0.5]."""

    _as_held: bool = PrivateAttr(default=False)

    def as_held(self) -> Self:
        """The same of parameters that keep the type in which the base holds them, but for those that its file
        lacks: for who writes them anew from the base's own at each step, and so needs no bits beyond."""
        made = self.model_copy()
        made._as_held = True
        return made

    @property
    def keeps_types(self) -> bool:
        return self._as_held

    def conflicts(self, recipe: Any) -> Iterator[tuple[str, str, str]]:
        yield from band_conflicts(self.band)

    def attach(self, base: Base) -> tuple[Any, Named]:
        """Tied parameters once. Raises M302."""
        from fnmatch import filter as matching
        from fnmatch import fnmatchcase

        from fedtune.model.adapters.layers import in_band, in_head, open_for_training

        for pattern in self.only:
            if not matching(base.weights, pattern):
                some = ", ".join(sorted(base.weights)[:3])
                raise FedtuneError(
                    "M302",
                    f"the pattern '{pattern}', which matches no parameter of {base.name}",
                    f"names such as {some}",
                    "correct the pattern",
                )
        body = [name for name in base.weights if not in_head(base, name)]
        within = in_band(base, body, self.band)
        chosen = {
            name
            for name in base.weights
            if in_head(base, name)
            or (
                name in within and (not self.only or any(fnmatchcase(name, pattern) for pattern in self.only))
            )
        }
        return base.net, open_for_training(base, chosen, self.keeps_types)

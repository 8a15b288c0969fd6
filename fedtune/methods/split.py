"""What a method can do whose model is held in parts: a site the ends, a body service the blocks between."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from fedtune.model.base import Base
    from fedtune.model.settings import ModelSettings
    from fedtune.model.tunable import TunableModel
    from fedtune.split.facts import SplitFacts
    from fedtune.split.parts import Part


class Split(Protocol):
    """Whoever serves, loads or reaches a part of a split model asks this.

    place   what two runs must have in common to share one body service
    merges  whether the body service may run micro-batches of different clients in one pass
    codec   how hidden states travel
    """

    @property
    def place(self) -> Mapping[str, int]: ...

    @property
    def merges(self) -> bool: ...

    @property
    def codec(self) -> str: ...

    def describe(self, tunable: TunableModel) -> SplitFacts:
        """What tickets tell sites of the coordinator's model."""

    def load_site(
        self, model: ModelSettings, task: str, labels: Sequence[str], seed: int, told: SplitFacts
    ) -> Base:
        """Head and tail, without ever holding the body. Raises S702 before training where they are not the
        coordinator's."""

    def load_body(self, model: ModelSettings, task: str) -> Part:
        """The body, without ever holding the rest."""

    def holds_parts(self, tunable: Any) -> bool:
        """Whether a tunable model has the two ends of a model only, so that it cannot score by itself."""

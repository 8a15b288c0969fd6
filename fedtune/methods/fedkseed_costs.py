"""What a client of FedKSeed needs, from config.json alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from fedtune.model.settings import ModelSettings

if TYPE_CHECKING:
    from fedtune.methods.fedkseed_settings import FedKSeedSettings
    from fedtune.model.memory_plan import Plan


class FedKSeedCosts:
    """Of walkers, and of clients with gradients where there may be some."""

    def __init__(self, settings: FedKSeedSettings) -> None:
        self.settings = settings

    def plan(self, model: ModelSettings, task: str, labels: int) -> Plan:
        from fedtune.model.memory_plan import plan

        return plan(model, self.settings.trained, task, labels)

    def memory(self, plan: Plan, length: int) -> Mapping[str, int]:
        from fedtune.model.memory_plan import inference_bytes, training_bytes

        walker = "fzoo" if self.settings.estimator == "fzoo" else "spsa"
        walking = {
            f"{walker}: {what}": count
            for what, count in inference_bytes(plan, self.settings.batch, length).items()
        }
        walking |= {f"{walker}: curvature": 4 * plan.trainable} if self.settings.curvature else {}
        if self.settings.walks_only:
            return walking
        return walking | {
            f"gradient: {what}": count
            for what, count in training_bytes(plan, self.settings.train, length).items()
        }

    def remarks(self, recipe: object, labels: int, rows: float) -> list[str]:
        return []

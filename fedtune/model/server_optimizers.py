"""[method.server]: the optimiser on the pseudo-gradient (state - mean of answers). Each is a table of
settings that makes torch's own optimiser.

FedAvgM: sgd with momentum. FedAdam (Reddi et al. 2021): adam. DiLoCo: sgd, lr 0.7, momentum 0.9, nesterov. No
torch at import.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from fedtune.plugins import extended
from fedtune.settings import Settings, classes_by_tag

if TYPE_CHECKING:
    import torch


class ServerOptimizer(Settings):
    """[method.server]: how the server steps from its state towards the mean of the answers."""

    optimizer: str

    def make(self, values: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        raise NotImplementedError(f"'{self.optimizer}' makes no optimiser")


class TakeMean(ServerOptimizer):
    """optimizer = "none": the mean of the answers is the new state (FedAvg)."""

    optimizer: Literal["none"] = "none"


class ServerSGD(ServerOptimizer):
    """optimizer = "sgd": torch.optim.SGD."""

    optimizer: Literal["sgd"] = "sgd"
    lr: float = Field(1.0, gt=0)
    """Server learning rate."""
    momentum: float = Field(0.0, ge=0, lt=1)
    """Momentum."""
    nesterov: bool = False
    """Nesterov momentum."""

    def conflicts(self, recipe: Any) -> Iterator[tuple[str, str, str]]:
        if self.nesterov and not self.momentum:
            yield "method.server.nesterov without momentum", "momentum above 0", "set method.server.momentum"

    def make(self, values: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        from torch.optim import SGD

        return SGD(values, lr=self.lr, momentum=self.momentum, nesterov=self.nesterov)


class ServerAdam(ServerOptimizer):
    """optimizer = "adam": torch.optim.Adam."""

    optimizer: Literal["adam"] = "adam"
    lr: float = Field(1.0, gt=0)
    """Server learning rate."""
    beta1: float = Field(0.9, ge=0, lt=1)
    """Decay of the first moment."""
    beta2: float = Field(0.99, ge=0, lt=1)
    """Decay of the second moment."""
    eps: float = Field(1e-3, gt=0)
    """Tau, the degree of adaptivity."""
    amsgrad: bool = False
    """Second moments never fall, the nearest that torch has to FedYogi's slow ones."""

    def make(self, values: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        from torch.optim import Adam

        return Adam(values, lr=self.lr, betas=(self.beta1, self.beta2), eps=self.eps, amsgrad=self.amsgrad)


class ServerAdamW(ServerOptimizer):
    """optimizer = "adamw": torch.optim.AdamW."""

    optimizer: Literal["adamw"] = "adamw"
    lr: float = Field(1.0, gt=0)
    """Server learning rate."""
    beta1: float = Field(0.9, ge=0, lt=1)
    """Decay of the first moment."""
    beta2: float = Field(0.99, ge=0, lt=1)
    """Decay of the second moment."""
    eps: float = Field(1e-3, gt=0)
    """Tau, the degree of adaptivity."""
    amsgrad: bool = False
    """Second moments never fall, the nearest that torch has to FedYogi's slow ones."""
    weight_decay: float = Field(0.0, ge=0)
    """Share of the state, times lr, that decays in a round."""

    def make(self, values: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        from torch.optim import AdamW

        return AdamW(
            values,
            lr=self.lr,
            betas=(self.beta1, self.beta2),
            eps=self.eps,
            amsgrad=self.amsgrad,
            weight_decay=self.weight_decay,
        )


class ServerAdagrad(ServerOptimizer):
    """optimizer = "adagrad": torch.optim.Adagrad."""

    optimizer: Literal["adagrad"] = "adagrad"
    lr: float = Field(1.0, gt=0)
    """Server learning rate."""
    eps: float = Field(1e-3, gt=0)
    """Tau, the degree of adaptivity."""

    def make(self, values: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        from torch.optim import Adagrad

        return Adagrad(values, lr=self.lr, eps=self.eps)


class ServerRMSprop(ServerOptimizer):
    """optimizer = "rmsprop": torch.optim.RMSprop."""

    optimizer: Literal["rmsprop"] = "rmsprop"
    lr: float = Field(1.0, gt=0)
    """Server learning rate."""
    beta2: float = Field(0.99, ge=0, lt=1)
    """Decay of the second moment."""
    eps: float = Field(1e-3, gt=0)
    """Tau, the degree of adaptivity."""

    def make(self, values: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        from torch.optim import RMSprop

        return RMSprop(values, lr=self.lr, alpha=self.beta2, eps=self.eps)


ServerSettings = Annotated[
    TakeMean | ServerSGD | ServerAdam | ServerAdamW | ServerAdagrad | ServerRMSprop,
    Field(discriminator="optimizer"),
]
if not TYPE_CHECKING:
    ServerSettings = extended(ServerSettings, "optimizer", "server_optimizers", ServerOptimizer)
SERVER_OPTIMIZERS: dict[str, type[ServerOptimizer]] = classes_by_tag(ServerSettings, "optimizer")

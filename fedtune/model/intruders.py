"""Intruder dimensions: leading singular vectors of a tuned matrix that none of the base's resembles.

Shuttleworth et al. 2024, "LoRA vs Full Fine-tuning: An Illusion of Equivalence" (arXiv:2410.21228), who find
that they go with forgetting. Counted as stock peft counts them, which also takes them back.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import peft
import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.intruders import reduce_intruder_dimension
from peft.utils.integrations import dequantize_module_weight

from fedtune.errors import FedtuneError
from fedtune.model.adapters import Lora
from fedtune.model.adapters.wrap import plain
from fedtune.model.tunable import TunableModel

LEADING = 10  # singular vectors of a matrix that are looked at
ALIKE = 0.5  # the cosine from which a vector is one that the base has, too
TAKEN_BACK = "intruders_reduced"


def intruders(tunable: TunableModel) -> dict[str, Any]:
    """Over all matrices that were tuned: how many leading vectors are intruders, of how many; and of each
    matrix that has some, how many and the least cosine. Raises M306 where no matrix was tuned."""
    found = {name: least_cosines(base, tuned) for name, base, tuned in matrices(tunable)}
    if not found:
        raise FedtuneError(
            "M306",
            f"intruder dimensions of kind '{tunable.kind}', which tunes no matrix of the base",
            "LoRA without dora, or a kind that trains the base's own matrices",
            "leave intruders out of --what",
        )
    counts = {name: int((cosines < ALIKE).sum()) for name, cosines in found.items()}
    return {
        "intruders": sum(counts.values()),
        "looked_at": sum(len(cosines) for cosines in found.values()),
        "matrices": len(found),
        "by_matrix": {
            name: {"intruders": count, "least_cosine": float(found[name].min())}
            for name, count in counts.items()
            if count
        },
    }


def least_cosines(base: torch.Tensor, tuned: torch.Tensor) -> torch.Tensor:
    """Matrices (m, n) -> for each leading left singular vector of `tuned`, the largest absolute cosine to one
    of the base's: (at most LEADING,)."""
    before = torch.linalg.svd(base.float(), full_matrices=False).U
    after = torch.linalg.svd(tuned.float(), full_matrices=False).U[:, :LEADING]
    return (after.T @ before).abs().amax(dim=1)


def matrices(tunable: TunableModel) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Name, as the base has it and as it was tuned, of every matrix that was."""
    if isinstance(tunable.net, peft.PeftModel):
        if isinstance(tunable.settings, Lora) and not tunable.settings.dora:
            for name, layer in tunable.net.named_modules():
                if isinstance(layer, LoraLayer) and "default" in layer.lora_A:
                    base = dequantize_module_weight(layer.get_base_layer()).detach()
                    yield plain(f"{name}.weight"), base, base + layer.get_delta_weight("default").detach()
        return
    for name, value in tunable.named.items():
        base = tunable.base.weights.get(name)
        if base is not None and base.ndim == 2 and name not in tunable.base.fresh:
            yield name, base, value.detach()


def reduce(tunable: TunableModel, left: float) -> int:
    """Take intruder dimensions of a LoRA adapter back, up to a share that is left of them; the adapter in the
    tunable model is then another. Returns how many there were. Raises M306 for other kinds."""
    if not isinstance(tunable.settings, Lora) or tunable.settings.dora:
        raise FedtuneError(
            "M306", f"--intruders for kind '{tunable.kind}'", "LoRA without dora", "leave --intruders out"
        )
    count = int(intruders(tunable)["intruders"])
    net = tunable.net
    reduce_intruder_dimension(
        net, new_adapter_name=TAKEN_BACK, top_k=LEADING, threshold_epsilon=ALIKE, mitigation_lambda=left,
        logging_sink=None,
    )  # fmt: skip
    with torch.no_grad():
        for layer in net.modules():
            if isinstance(layer, LoraLayer) and TAKEN_BACK in layer.lora_A:
                for factor in (layer.lora_A, layer.lora_B):
                    factor["default"].weight.copy_(factor[TAKEN_BACK].weight)
    net.set_adapter("default")
    net.delete_adapter(TAKEN_BACK)
    return count

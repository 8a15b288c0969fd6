"""Which positions of a weight a sparse kind trains: chosen from the base alone, so that every party finds the
same ones and no index travels.

The values of a layer are one vector in the order of rows, as in peft's SHiRA (Bhardwaj et al. 2024,
arXiv:2406.13175): their sum over clients is exact, and peft loads the file. Positions are the same wherever
the base is the same and its singular vectors come out alike (float64, LAPACK's); `base_print` tells parties
apart for whom they do not.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Mapping
from types import MethodType
from typing import TYPE_CHECKING, Any

import numpy as np
import peft
import torch
from peft.tuners.shira.layer import ShiraLayer
from peft.tuners.supertuning.layer import SupertuningLayer

from fedtune.errors import FedtuneError
from fedtune.model.adapters.layers import Named, target_layers
from fedtune.model.adapters.wrap import file_name, peft_arguments, with_peft
from fedtune.model.base import Base

if TYPE_CHECKING:
    from fedtune.model.adapters.base import SparseAdapter

VALUES, INDICES = ".shira_weight", ".shira_indices"  # how their names in peft's file end
PLACES = ".supertuning_indices"  # of a layer with a low-rank update beside: in the flat weight

# name of a layer, its weight (rows, columns) as float64, number of positions -> those positions in the order
# of rows, ascending
Choice = Callable[[str, np.ndarray, int], np.ndarray]


def with_support(base: Base, settings: SparseAdapter, choose: Choice, stages: int = 1) -> tuple[Any, Named]:
    """The base with trained values at chosen positions of the target layers; `stages` times as many must be
    there. Raises M302, M306."""
    layers = {base.net.get_submodule(name).weight: name for name in target_layers(base, settings)}
    for weight, name in layers.items():
        check_size(base, settings, name, tuple(weight.shape), stages)

    def mask(layer: Any, rank: int, **_: Any) -> torch.Tensor:
        weight = layer.weight
        count = rank * sum(weight.shape)
        flat = np.zeros(weight.numel(), np.bool_)
        if weight.device.type == "meta":  # there are no weights to look at, and sizes do not depend on them
            flat[:count] = True
        else:
            wide = weight.detach().to("cpu", torch.float64).numpy()
            flat[choose(layers[weight], wide, count)] = True
        return torch.from_numpy(flat.reshape(tuple(weight.shape))).to(torch.float32)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft does not know the name of the mask, which it is given
        config = peft.ShiraConfig(
            r=settings.rank,
            mask_type=settings.kind,
            target_modules=list(layers.values()),
            **peft_arguments(base, settings.modules_to_save),
        )
    config.mask_fn = mask
    net, named = with_peft(base, config)
    config.mask_fn = None  # which holds the base's weights
    for layer in sparse_layers(net).values():
        add_densely(layer)
    return net, named


def check_size(base: Base, settings: SparseAdapter, name: str, shape: tuple[int, ...], stages: int) -> None:
    """Raises M306 for a layer with fewer weights than should be trained, in all stages together, or whose
    weight is no matrix."""
    rows, columns = shape if len(shape) == 2 else (0, 0)
    most = rows * columns // max(rows + columns, 1) // stages
    if settings.rank > most:
        times = f" in {stages} stages" if stages > 1 else ""
        raise FedtuneError(
            "M306",
            f"method.adapter.rank = {settings.rank}{times} for '{name}' of {base.name} (weight of {shape})",
            f"at most {most}, with which {most} x (rows + columns) of its weights are trained",
            "lower method.adapter.rank, or choose other method.adapter.targets",
        )


def add_densely(layer: Any) -> None:
    """Let a layer of peft make its change as a dense matrix, to the same bits: torch has no sparse sums
    without memory (`fedtune check`) and keeps no order of them on a GPU."""
    rows, columns = layer.shira_indices["default"].long()
    flat = (rows * layer.in_features + columns).to(layer.get_base_layer().weight.device)
    layer.register_buffer("positions", flat, persistent=False)

    def get_delta_weight(self: Any, adapter: str) -> torch.Tensor:
        values = self.shira_weight[adapter] * self.scaling[adapter]
        flat = values.new_zeros(self.out_features * self.in_features).scatter(0, self.positions, values)
        return flat.view(self.out_features, self.in_features)

    layer.get_delta_weight = MethodType(get_delta_weight, layer)


def greatest(size: np.ndarray, count: int) -> np.ndarray:
    """Positions of the `count` greatest entries, ascending; of equal ones, those that come first."""
    flat = size.reshape(-1)
    least = np.partition(flat, flat.size - count)[flat.size - count]
    above = np.flatnonzero(flat > least)
    equal = np.flatnonzero(flat == least)[: count - above.size]
    return np.sort(np.concatenate([above, equal]))


def low_rank(weight: np.ndarray, rank: int) -> np.ndarray:
    """The best approximation of this rank in least squares, by the eigenvectors of the smaller Gram matrix:
    O(min^3) where a whole SVD takes a multiple. Signs of vectors do not matter to it."""
    tall = weight if weight.shape[0] >= weight.shape[1] else weight.T
    vectors = np.linalg.eigh(tall.T @ tall)[1][:, -rank:]
    made: np.ndarray = (tall @ vectors) @ vectors.T
    return made if tall is weight else made.T


def choose_greatest(net: Any) -> None:
    """Of layers with a low-rank update beside, the same places on every device: as many as peft has chosen,
    ascending, of equal weights those that come first."""
    for layer in sparse_layers(net).values():
        weight, chosen = layer.get_base_layer().weight.detach(), layer.supertuning_indices["default"]
        if weight.device.type != "meta":
            size = np.abs(weight.to("cpu", torch.float32).numpy())
            places = greatest(size, len(chosen)).astype(np.int32)
            layer.supertuning_indices["default"] = torch.from_numpy(places).to(chosen.device)


def sparse_layers(net: Any) -> dict[str, Any]:
    """Name of a layer, as the names of tensors begin -> layer."""
    kinds = (ShiraLayer, SupertuningLayer)
    return {name: module for name, module in net.named_modules() if isinstance(module, kinds)}


def positions(net: Any) -> dict[str, np.ndarray]:
    """What is trained, by the name that it has in peft's file: rows and columns (2, n), or places in the flat
    weight (n,)."""
    found: dict[str, np.ndarray] = {}
    for name, layer in sorted(sparse_layers(net).items()):
        ending = INDICES if isinstance(layer, ShiraLayer) else PLACES
        chosen = getattr(layer, ending[1:])["default"]
        found[file_name(name + ending)] = chosen.cpu().numpy().astype(np.int32)
    return found


def base_print(base: Base) -> str:
    """What all parties of a run must agree on, as hex: the base's fingerprint and, of a sparse kind, the
    positions that they chose."""
    tunable = base.attached
    if tunable is None or not tunable.settings or not tunable.settings.sparse:
        return base.fingerprint
    total = hashlib.sha256(bytes.fromhex(base.fingerprint))
    for name, chosen in positions(tunable.net).items():
        total.update(name.encode())
        total.update(np.ascontiguousarray(chosen, "<i4").data)
    return total.hexdigest()


def without_positions(net: Any, tensors: Mapping[str, np.ndarray], place: str) -> dict[str, np.ndarray]:
    """The values of an adapter's file. Raises M304 where they are for other positions than these."""
    here = positions(net)
    there = {name: value for name, value in tensors.items() if name.endswith((INDICES, PLACES))}
    for name, chosen in there.items():
        if name not in here or not np.array_equal(here[name], chosen):
            raise FedtuneError(
                "M304",
                f"'{place}', whose values are for other positions of '{name.rpartition('.')[0]}'",
                "the positions that follow from this base and these settings",
                "use the settings that it was made with, or merge it with the machine that made it",
            )
    return {name: value for name, value in tensors.items() if name not in there}

"""Networks with running statistics: frozen while training, in the fingerprint, one score for one state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T
from torch import nn

from fedtune.hf.statistics import freeze_statistics, saved_buffers, unchanged
from fedtune.model.base import Base, load
from fedtune.model.encode import encode
from fedtune.model.fit import fit
from fedtune.model.settings import ModelSettings, TrainSettings
from fedtune.model.tunable import attach, detach
from tests import tiny
from tests.tables import adapter_of

SMALL = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
NETS = {
    "resnet": (T.ResNetModel, T.ResNetConfig(**SMALL)),
    "regnet": (
        T.RegNetModel,
        T.RegNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], groups_width=8),
    ),
    "mobilenet": (T.MobileNetV1Model, T.MobileNetV1Config(depth_multiplier=0.25, min_depth=8)),
}


def opened(name: str, folder: Path) -> Base:
    T.ConvNextImageProcessor(size={"shortest_edge": 8}, crop_pct=1.0).save_pretrained(folder)
    net, config = NETS[name]
    return load(
        ModelSettings(name=str(tiny.save(net, config, folder)), threads=1, device="cpu"),
        "image-classify",
        ("a", "b"),
        1,
    )


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize(("kind", "batch"), [("full", 3), ("full", 1), ("head", 1), ("lora", 2)])
def test_training_leaves_running_statistics_as_they_were(
    name: str, kind: str, batch: int, tmp_path: Path
) -> None:
    base = opened(name, tmp_path)
    before = {key: value.clone() for key, value in base.buffers.items()}
    assert before
    if kind == "lora" and not any(isinstance(module, nn.Linear) for module in base.net.base_model.modules()):
        return  # convolutions alone: M306
    tunable = attach(base, adapter_of(kind=kind), 0)  # type: ignore[arg-type]
    start = tunable.read()
    fit(tunable, encode(tiny.images(6), base), TrainSettings(steps=3, batch=batch, lr=0.05), 1)
    assert any((tunable.read()[key] != start[key]).any() for key in start)
    for key, value in saved_buffers(base.net).items():
        assert torch.equal(value, before[key]), key
    detach(tunable)


def test_the_fingerprint_covers_the_statistics(tmp_path: Path) -> None:
    one = opened("resnet", tmp_path)
    net = T.ResNetModel.from_pretrained(tmp_path)
    next(module for module in net.modules() if isinstance(module, nn.BatchNorm2d)).running_mean += 1
    net.save_pretrained(tmp_path)
    other = load(ModelSettings(name=str(tmp_path), threads=1, device="cpu"), "image-classify", ("a", "b"), 1)
    assert one.fingerprint != other.fingerprint


def test_other_layers_with_memory_are_frozen_or_put_back() -> None:
    class Counting(nn.Module):  # type: ignore[misc]
        """Writes into a buffer of its own, under a name that nobody knows."""

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(1))

        def forward(self, x: Any) -> Any:
            self.seen += 1
            return x

    net = nn.Sequential(
        nn.InstanceNorm1d(3, track_running_stats=True),
        nn.utils.spectral_norm(nn.Linear(4, 4)),
        Counting(),
        nn.Dropout(0.5),
    ).train()
    before = {key: value.clone() for key, value in saved_buffers(net).items()}
    freeze_statistics(net)
    assert net[3].training and not net[0].training
    with unchanged(net):
        net(torch.randn(2, 3, 4))
        assert net[2].seen.item() == 1
    assert all(torch.equal(value, before[key]) for key, value in saved_buffers(net).items())

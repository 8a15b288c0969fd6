"""What is planned from config.json alone is what the loaded model has."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from fedtune.errors import FedtuneError
from fedtune.model.memory_plan import plan
from fedtune.model.settings import ModelSettings
from fedtune.model.tunable import attach
from tests.model.cases import ALL, REFUSED, VARIANTS
from tests.tables import adapter_of


@pytest.mark.parametrize(("model", "variant"), ALL)
def test_the_plan_is_the_bench(workspace: Any, model: str, variant: str) -> None:
    settings = adapter_of(**VARIANTS[variant])
    planned = plan(workspace.settings(model), settings, workspace.tasks[model], 2)
    tunable = attach(workspace.base(model), settings, 1)
    assert planned.shapes == {name: value.shape for name, value in tunable.read().items()}
    assert (planned.trainable, planned.total, planned.weights_bytes) == (
        tunable.trainable,
        tunable.total,
        4 * tunable.base.size,
    )


@pytest.mark.parametrize(("model", "variant"), sorted(REFUSED))
def test_the_plan_refuses_what_the_bench_refuses(workspace: Any, model: str, variant: str) -> None:
    with pytest.raises(FedtuneError, match="M306"):
        plan(workspace.settings(model), adapter_of(**VARIANTS[variant]), workspace.tasks[model], 2)


def test_no_weights_are_needed(workspace: Any, tmp_path: Path) -> None:
    shutil.copy(workspace.folders["encoder"] / "config.json", tmp_path)
    half = plan(ModelSettings(name=str(tmp_path), dtype="bfloat16"), adapter_of(kind="head"), "classify", 150)
    assert half.shapes == {"classifier.weight": (150, 32), "classifier.bias": (150,)}
    assert half.weights_bytes == 2 * half.total


def test_the_papers_sizes(tmp_path: Path) -> None:
    """ViT-B/16 with 100 classes, as FedPEFT's code counts (Sun et al. 2022): values sent per client, one
    way."""
    from transformers import ViTConfig

    ViTConfig(image_size=224, patch_size=16).save_pretrained(tmp_path)
    sizes = {"head": 76_900, "bias": 179_812, "adapter": 225_220, "prompt": 169_060, "full": 85_875_556}
    for kind, size in sizes.items():
        planned = plan(
            ModelSettings(name=str(tmp_path)),
            adapter_of(kind, **({"deep": True} if kind == "prompt" else {})),
            "image-classify",
            100,
        )  # type: ignore[arg-type]
        assert planned.trainable == size

"""Bands of blocks: the part of the depth that is adapted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedtune.config import parse
from fedtune.errors import FedtuneError
from fedtune.model.adapters.layers import in_band
from fedtune.model.tunable import attach
from tests import small
from tests.tables import adapter_of


def test_cofitunes_band_of_thirty_blocks(workspace: Any) -> None:
    names = [f"model.layers.{block}.mlp.up_proj.weight" for block in range(30)] + ["lm_head.weight"]
    found = in_band(workspace.base("causal"), names, (0.25, 0.5))
    assert sorted(int(name.split(".")[2]) for name in found) == list(range(8, 15))
    parts = [in_band(workspace.base("causal"), names, band) for band in ((0.0, 0.3), (0.3, 0.7), (0.7, 1.0))]
    assert sum(map(len, parts)) == len(set().union(*parts)) == 30
    assert in_band(workspace.base("causal"), names, (0.0, 1.0)) == set(names)


@pytest.mark.parametrize("kind", ["lora", "ia3", "shira", "lift"])
def test_the_upper_half_is_the_last_of_two_blocks(kind: str, workspace: Any) -> None:
    base = workspace.base("causal")
    last = list(attach(base, adapter_of(kind=kind, last=1), 1).named)
    assert list(attach(base, adapter_of(kind=kind, band=(0.5, 1.0)), 1).named) == last
    low = attach(base, adapter_of(kind=kind, band=(0.0, 0.5)), 1).named
    assert len(low) == len(last) and all(".layers.0." in name for name in low)


def test_full_tuning_of_a_band_trains_the_head_too(workspace: Any) -> None:
    base = workspace.base("encoder")
    tuned = attach(base, adapter_of(kind="full", band=(0.0, 0.5), only=("*dense*",)), 1).named
    assert {"classifier.weight", "bert.encoder.layer.0.output.dense.weight"} < tuned.keys()
    assert all(name.startswith(("classifier.", "bert.encoder.layer.0.")) for name in tuned)
    assert not any("query" in name for name in tuned)


def test_a_band_without_blocks_is_refused(workspace: Any) -> None:
    with pytest.raises(FedtuneError, match=r"M302: found method.adapter.band = \[0.6, 0.9\], in which none"):
        attach(workspace.base("causal"), adapter_of(band=(0.6, 0.9)), 1)


@pytest.mark.parametrize(
    ("adapter", "words"),
    [
        ({"kind": "lora", "band": [0.5, 0.25]}, r"C104: found method.adapter.band = \[0.5, 0.25\]"),
        ({"kind": "full", "band": [0.5, 0.5]}, r"C104: found method.adapter.band = \[0.5, 0.5\]"),
        ({"kind": "lora", "band": [0.5, 1.0], "last": 2}, "C104: found method.adapter.last with"),
        ({"kind": "lora", "band": [0.5, 1.5]}, "C102"),
    ],
)
def test_bands_that_make_no_sense_are_refused(adapter: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(FedtuneError, match=words):
        parse(small.tree(Path("none"), tmp_path, method__adapter=adapter))

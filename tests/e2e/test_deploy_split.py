"""SFPrompt on real sites: each holds two of eight blocks, the body runs beside the exchange, and is killed
twice; the bytes are those of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers

from tests import small, tiny
from tests.e2e.deploying import SITES, deployed, local

TRAIN = {"lr": 0.01, "steps": 4, "batch": 4, "accumulate": 2}
SPLIT: dict[str, Any] = {
    "rounds": 3,
    "method": {"type": "sfprompt", "head": 1, "tail": 1, "prompts": 3, "codec": "fp32", "train": TRAIN},
}


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder of eight blocks."""
    folder = tiny.bert(tmp_path_factory.mktemp("deep"))
    config = transformers.BertConfig.from_pretrained(folder)
    config.num_hidden_layers = 8
    return tiny.save(transformers.BertModel, config, folder)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_body_killed_twice_changes_no_bit_and_no_site_holds_it(deep: Path, tmp_path: Path) -> None:
    data = small.write_rows(tmp_path)
    with deployed(tmp_path / "deploy") as federation:
        federation.join_all()
        federation.serve(federation.recipe("split", deep, data, **SPLIT))
        for number in (1, 2):
            federation.wait_round("split", number)
            assert len(federation.kill("gateway")) == 1
        assert federation.ended() == 0
        folder, (_, result) = federation.folder("split"), local(tmp_path, deep, data, **SPLIT)
        found = folder.read_json("result.json")
        assert found["state_sha256"] == result["state_sha256"] and found["left_out"] == 0
        for site in SITES:
            built = [event for event in federation.worker_events(site) if event["event"] == "WorkspaceBuilt"]
            assert len(built) == 1 and built[0]["trainable"] == found["trainable"]
            assert found["total"] - built[0]["total"] == 6 * block_of(deep)


def block_of(folder: Path) -> int:
    """Parameters of one block."""
    net = transformers.BertModel.from_pretrained(folder)
    return sum(value.numel() for value in net.encoder.layer[0].parameters())

"""Experts on real sites: four of two kinds, grouped by what they learn, then a gate; the bytes of a local run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedtune.experts.state import experts_of, gate_of, groups_of
from fedtune.runtime.checkpoints import load_state
from tests import small
from tests.e2e.deploying import deployed, local
from tests.e2e.test_flower import journal
from tests.methods.test_experts import sites

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
FOUR = ("site-a", "site-b", "site-c", "site-d")


def test_four_sites_in_two_clusters_end_with_the_bytes_of_a_local_run(
    tiny_bert: Path, tmp_path: Path
) -> None:
    labels = sorted(small.WORDS)
    data = sites(tmp_path, 4, lambda site, label: labels[(labels.index(label) + site % 2) % 3])
    by = {
        "by": "clusters",
        "warm_up": 1,
        "min_clients": 2,
        "sketch": 256,
        "rank": "auto",
        "gate": {"rounds": 1},
    }
    changes: dict[str, Any] = {
        "partition": {"by": "column", "column": "site", "clients": 4},
        "rounds": 4,
        "method__type": "experts",
        "method__experts": by,
        "method__train": {"lr": 0.02, "steps": 4, "batch": 8},
    }
    with deployed(tmp_path / "deploy", FOUR) as made:
        for site in FOUR:
            made.join(site)
        made.serve(made.recipe("experts", tiny_bert, data, **changes))
        assert made.ended() == 0
        alone, result = local(tmp_path / "local", tiny_bert, data, **changes)
        assert made.folder("experts").read_json("result.json")["state_sha256"] == result["state_sha256"]
        assert journal(made.folder("experts")) == journal(alone)
    state, _ = load_state(alone, 4, "")
    assert set(groups_of(state.kept).values()) == {(0, 2), (1, 3)}
    assert len(experts_of(state.shared)) == 2 and gate_of(state.shared)

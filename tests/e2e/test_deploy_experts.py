"""Experts on real sites: four of two kinds, grouped by what they learn, then a gate; the bytes of a local run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedtune.experts.state import experts_of, gate_of, groups_of
from fedtune.runtime.checkpoints import load_state
from tests import small
from tests.e2e.deploying import deployed, local
from tests.e2e.test_flower import journal

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
FOUR = ("site-a", "site-b", "site-c", "site-d")


def test_four_sites_in_two_clusters_end_with_the_bytes_of_a_local_run(
    tiny_bert: Path, tmp_path: Path
) -> None:
    lines, kinds = [], sorted(small.WORDS)[:2]
    for number, row in enumerate(one for one in small.rows(240) if one["label"] in kinds):
        # 0 and 2 have rows of one label, 1 and 3 of another
        site = kinds.index(row["label"]) + 2 * (number // 2 % 2)
        lines.append(json.dumps({**row, "site": f"site-{site}"}) + "\n")
    data = tmp_path / "sites.jsonl"
    data.write_text("".join(lines))
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
    assert sorted(map(len, groups_of(state.kept).values())) == [2, 2]
    assert len(experts_of(state.shared)) == 2 and gate_of(state.shared)

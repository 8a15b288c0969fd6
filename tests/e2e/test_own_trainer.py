"""A federation of real processes, at one of whose sites the site's own script trains."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import tiny
from tests.deploy import script
from tests.e2e.deploying import SITES, deployed, local


@pytest.mark.slow
def test_a_script_trains_at_a_real_site(data: Path, tmp_path: Path) -> None:
    model = tiny.llama(tmp_path / "model")
    changes = {
        "rounds": 2,
        "data__task": "causal-lm",
        "data__max_length": 16,
        "method__adapter": {"kind": "lora", "rank": 2, "alpha": 4},
    }
    with deployed(tmp_path) as made:
        server = made.serve(made.recipe("run", model, data, **changes))
        mine = tmp_path / "mine.py"
        mine.write_text(script.text(model))
        made.join(SITES[0], "--trainer", str(mine))
        for site in SITES[1:]:
            made.join(site)
        assert made.ended() == 0 and server.returncode == 0
        result = made.folder("run").read_json("result.json")
    assert result["left_out"] == 0 and result["rounds"] == 2
    rounds = tmp_path / f"home-{SITES[0]}" / "trainer" / "out.rounds"
    assert rounds.read_text().split() == ["2", "2"]  # two rounds of two steps, by the script
    alone = local(tmp_path / "local", model, data, **changes)[1]
    assert result["state_sha256"] != alone["state_sha256"]

"""A federation of real processes, at one of whose sites the site's own script trains."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import tiny
from tests.deploy import script
from tests.e2e.deploying import SITES, deployed


@pytest.mark.slow
def test_a_script_trains_at_a_real_site(data: Path, tmp_path: Path) -> None:
    model = tiny.llama(tmp_path / "model")
    changes = {
        "rounds": 2,
        "partition__clients": 2,
        "data__task": "causal-lm",
        "data__max_length": 16,
        "method__adapter": {"kind": "lora", "rank": 2, "alpha": 4},
    }
    with deployed(tmp_path, SITES[:2]) as made:
        server = made.serve(made.recipe("run", model, data, **changes))
        mine = tmp_path / "mine.py"
        mine.write_text(script.text(model))
        made.join(SITES[0], "--trainer", str(mine))
        made.join(SITES[1])
        assert made.ended() == 0 and server.returncode == 0
        result = made.folder("run").read_json("result.json")
    assert result["left_out"] == 0 and result["rounds"] == 2
    rounds = tmp_path / f"home-{SITES[0]}" / "trainer" / "out.rounds"
    assert rounds.read_text().split() == ["2", "2"]  # two rounds of two steps, by the script

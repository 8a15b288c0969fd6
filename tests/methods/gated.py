"""What every run of experts behind a gate must keep, whatever its gate looks like."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import fedtune
from fedtune.runtime.finished import export_run, installed
from fedtune.runtime.folder import RunFolder
from fedtune.runtime.workspace import Workspace

IDS = torch.arange(3, 15)[None]


def answer(net: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = net(input_ids=IDS).logits
    return found


def same_wherever(made: RunFolder, out: Path) -> Workspace:
    """Installed, exported to `out`, and loaded: one answer; generating with a cache and without agree."""
    workspace, _, _ = installed(made, "last")
    want = answer(workspace.tunable.net)
    export_run(made, "adapter", out, which="last")
    for place in (made.path, out):
        net, _ = fedtune.load(place, round="last")
        torch.testing.assert_close(answer(net), want, rtol=1e-4, atol=1e-5)
    how = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(*(net.generate(input_ids=IDS, use_cache=cached, **how) for cached in (True, False)))
    return workspace

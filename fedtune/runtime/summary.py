"""A run's result, as other programs read it."""

from __future__ import annotations

import resource
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fedtune.runtime import privacy
from fedtune.runtime.baselines import spread_of
from fedtune.runtime.phases import by_phase
from fedtune.versions import versions

if TYPE_CHECKING:
    from fedtune.runtime.run import Run


def summary(work: Run, scores: Mapping[str, Any]) -> dict[str, Any]:
    """What other programs read (DESIGN: result.json)."""
    answers = [a for _, a in work.journal.answers()]
    asked = max(1, len(answers))
    rounds = work.journal.rounds()
    return {
        "metric": scores["metric"],
        **{key: scores.get(key) for key in ("base", "local", "federated", "federated_last", "centralised")},
        **{key: scores.get(key) or {} for key in ("also", "figures")},
        "samples": scores.get("samples", []),
        "per_client": spread_of(scores.get("clients_metric") or {}),
        "rounds": len(rounds),
        "clients": len(work.workspace.present),
        "left_out": sum(a.outcome != "ok" for a in answers),
        "up_bytes_per_client_round": sum(a.up_bytes for a in answers) / asked,
        "down_bytes_per_client_round": sum(a.down_bytes for a in answers) / asked,
        "seconds": work.clock["seconds"],
        "first_round_seconds": work.clock["first_round_seconds"],
        "seconds_by_phase": by_phase(work.clock),
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "state_sha256": rounds[-1].state_sha256,
        **privacy.told(work.recipe, work.journal),
        "phases": {name: scores[name] for name in ("loss", "clients_metric") if name in scores},
        "trainable": work.trainable,
        "total": work.workspace.tunable.total,
        "adapter": str(work.folder.adapter),
        **({"distilled": dict(error)} if (error := work.workspace.tunable.distilled) else {}),
        "method": work.recipe.method.type,
        "seed": work.recipe.seed,
        "recipe_sha256": work.recipe.fingerprint,
        "base_sha256": work.workspace.base.fingerprint,
        "versions": versions(),
    }

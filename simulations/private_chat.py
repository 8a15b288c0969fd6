"""What differential privacy costs a real language model: SmolLM2-135M learns at two sites how documentation
answers.

    python simulations/private_chat.py [--set ...] [--seeds 1 2 3] [--epsilons inf 8 3 1] [--results FOLDER]

The questions of the built-in chat recipe without a chat template, so that texts are short; rows lie at two sites
by chance. LoRA's B in the last two blocks (rule ffa: noise on one factor is not multiplied by noise on the
other), DP-SGD on steps of half of all rows, epsilon of a row at delta 1e-5. Loss of a held-out answer's token, and
the share of what training gains without privacy. Writes simulations/results/private-chat.json, row by row.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

from privacy import Place, finite, noises
from record import RESULTS, hardware

from fedtune.model.score import score

ROUNDS, STEPS, RATE = 3, 2, 0.5
SETS = [
    "data.template=plain",
    "data.per_package=250",
    "data.test_share=0.1",
    'partition={by = "iid", clients = 2}',
    "evaluate.base=false",
    'aggregate={rule = "ffa"}',
    "method.adapter.rank=2",
    "method.adapter.alpha=4",
    "method.adapter.last=2",
    "method.adapter.keep_front=true",
    "method.train.clip=0.0",
    "method.train.optimizer=sgd",
    "method.train.lr=1.0",
    "method.train.batch=16",
    f"method.train.steps={STEPS}",
    f"rounds={ROUNDS}",
]
RATES = {math.inf: 1.0, 8.0: 1.0, 3.0: 0.6, 1.0: 0.3}  # of SGD, chosen on seed 11
CHAT = "../fedtune/recipes/chat.toml"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--seeds", nargs="*", type=int, default=[1, 2, 3])
    parser.add_argument("--epsilons", nargs="*", type=float, default=[math.inf, 8.0, 3.0, 1.0])
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    path = options.results / "private-chat.json"
    table: dict[str, Any] = (
        json.loads(path.read_text())
        if path.exists()
        else {"recipe": "chat.toml, 2 sites", "hardware": hardware(), "rows": {}}
    )

    def keep(name: str, seed: int, found: dict[str, Any]) -> None:
        table["rows"].setdefault(name, {})[str(seed)] = found
        path.write_text(json.dumps(table, indent=1, allow_nan=False) + "\n")
        print(name, seed, json.dumps(found), flush=True)

    for seed in options.seeds:
        place = Place(CHAT, [*SETS, f"seed={seed}", *options.set], RATE)
        keep("no training", seed, {"loss": (base := loss(place))})
        gain = math.nan
        for epsilon in options.epsilons:
            began = time.process_time()
            _, noise, found = noises(epsilon, 0.0, RATE, ROUNDS * STEPS)
            method, state = place.played(noise, [f"method.train.lr={RATES[epsilon]}"])
            method.install(state, place.workspace.tunable)
            after = loss(place)
            gain = base - after if math.isinf(epsilon) else gain
            keep(f"epsilon {epsilon:g}", seed, {
                "loss": after, "share": finite((base - after) / gain), "epsilon": finite(found),
                "noise_multiplier": noise, "cpu_seconds": round(time.process_time() - began, 1)})  # fmt: skip


def loss(place: Place) -> float:
    """Nats a token of a held-out answer, as the model stands."""
    workspace = place.workspace
    return float(score(workspace.tunable, workspace.test(), 16, workspace.front()).loss)


if __name__ == "__main__":
    main()

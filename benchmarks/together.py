"""What one pass for several clients is worth: CPU seconds of local steps of eight clients, trained one after the
other and all at once over the same base (`method.train.together`), on the built-in federation's encoder with
LoRA in all blocks.

small   one text of at most 32 tokens a step, where a step is mostly overhead
usual   eight texts of at most 128 tokens

python benchmarks/together.py [--repeats 5] [--steps 4] [--tiny]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence

from claims import at_most

from fedtune import config
from fedtune.model.fit import fit
from fedtune.model.together import Trainee, fit_together
from fedtune.runtime.checkpoints import ClientStates
from fedtune.runtime.workspace import Workspace, build_workspace

SIZES = {"small": (1, 32), "usual": (8, 128)}  # texts a step, tokens a text
TINY = {"small": (1, 8)}
GOALS = {"small": 0.5, "usual": 1.0}


def workspace_of(batch: int, tokens: int, steps: int, clients: int) -> Workspace:
    sets = [
        f'partition={{by = "iid", clients = {clients}}}',
        f"data.max_length={tokens}",
        f"method.train.batch={batch}",
        f"method.train.steps={steps}",
        "method.adapter.last=0",
        "method.adapter.keep_front=false",
        "method.head_start=random",
        "model.threads=1",
        "data.limit=400",
    ]
    recipe = config.read(None, sets)
    return build_workspace(recipe, config.method_of(recipe), ClientStates(None), lambda event: None)


def taken(workspace: Workspace, clients: int, both: Sequence[str]) -> dict[str, float]:
    """CPU seconds of one round of local steps, either way."""
    tunable, settings = workspace.tunable, workspace.recipe.method.train
    start = tunable.read()
    trainees = [Trainee(workspace.train(n), start, n) for n in range(clients)]
    spent = {}
    for way in both:
        began = time.process_time()
        if way == "together":
            fit_together(tunable, trainees, settings, frozenset(tunable.named))
        else:
            for one in trainees:
                tunable.write(start)
                fit(tunable, one.encoded, settings, one.seed)
        spent[way] = time.process_time() - began
        tunable.write(start)
    return spent


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5, help="alternating; the median counts")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument(
        "--tiny",
        action="store_true",
        help="the smallest sizes: shows that the script runs, its figures mean nothing",
    )
    options = parser.parse_args()
    clients, steps, repeats = (2, 1, 1) if options.tiny else (8, options.steps, options.repeats)
    claims = []
    for size, (batch, tokens) in (TINY if options.tiny else SIZES).items():
        workspace = workspace_of(batch, tokens, steps, clients)
        taken(workspace, clients, ("alone", "together"))  # warm
        runs = [taken(workspace, clients, ("alone", "together")) for _ in range(repeats)]
        ours, other = (statistics.median(run[way] for run in runs) for way in ("together", "alone"))
        print(
            f"{size:<8}{clients} clients x {steps} steps of {batch} x {tokens}: together {ours:.2f} s CPU, alone {other:.2f}"
        )
        claims.append(
            at_most(
                f"{clients} clients in one pass, {batch} x {tokens}, against one after the other",
                ours,
                other,
                GOALS[size],
            )
        )
    print(json.dumps(claims))


if __name__ == "__main__":
    main()

"""FedKSeed's learning table: simulations/results/fedkseed.json. A tiny story model, Dolly-15K, one category
never seen in training.

    python simulations/dolly.py --model FOLDER/stories260K-fp32 --data FOLDER/dolly15k.jsonl [--only NAME ...]
    [--seeds 1 2 3] [--again]
    python simulations/dolly.py --model ... --data ... --prepare FOLDER     (only the data, for `fedtune
    simulate simulations/fedkseed.toml`)

Every row is simulations/fedkseed.toml with overrides, or a plain torch loop that knows nothing of fedtune's
method (the last rows). All are scored
in the same way: mean over four batches of the mean loss of a response's token, on 256 rows of the seen
categories and 256 of the unseen one.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
HERE = Path(__file__).parent
UNSEEN = "summarization"
SGD = ["method.train.optimizer=sgd", "method.train.lr=0.03", "method.train.steps=10", "method.train.batch=4"]
ROWS: dict[str, list[str]] = {
    "hadamard pool (default)": [],
    "hadamard pool, new each round": ["method.refresh=1"],
    "independent Rademacher": ["method.pool=independent"],
    "independent Gaussian": ["method.pool=independent", "method.directions=gaussian"],
    "scalars of 1 bit": ["method.bits=1", "method.lr=5e-4"],
    "importance (Pro)": ["method.importance=true"],
    "FZOO, 11 groups of 8": ["method.estimator=fzoo", "method.steps=88", "method.lr=8e-4"],
    "curvature (HiSo), new pool each round": ["method.curvature=true", "method.refresh=1"],
    "lr = 1e-3": ["method.lr=1e-3"],
    "all gradient": ["method.estimator=gradient", *SGD],
    "all gradient, new pool each round": ["method.estimator=gradient", "method.refresh=1", *SGD],
    "half gradient": ["method.estimator=auto", "method.estimators=['spsa', 'gradient']", *SGD],
    "LoRA, spsa": ["method.space=adapter", "method.lr=1e-3"],
    "LoRA, gradient": ["method.space=adapter", "method.estimator=gradient", *SGD, "method.train.lr=0.1"],
}


def prepare(source: Path, model: Path, folder: Path) -> None:
    """train.jsonl (seen categories), test.jsonl (256 of them) and, beside the folder that a recipe reads,
    unseen.jsonl (256 rows).

    As in the paper's protocol a whole category is held out. Prompts have at most 64 tokens, answers 400
    characters and at least 16 tokens within 128.
    """
    import numpy as np
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    rows: dict[bool, list[dict[str, str]]] = {True: [], False: []}
    for line in source.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        prompt, response = f"Q: {row['instruction'].strip()[:200]}\nA:", " " + row["response"].strip()[:400]
        ids = tokenizer(prompt, add_special_tokens=False).input_ids[:64]
        room = 127 - len(ids)
        if (
            response.strip()
            and min(len(tokenizer(response, add_special_tokens=False).input_ids) + 1, room) >= 16
        ):
            prompt = prompt if len(ids) < 64 else tokenizer.decode(ids)
            rows[row["category"] == UNSEEN].append(
                {"prompt": prompt, "response": response, "category": row["category"]}
            )
    draw = np.random.default_rng(42)
    seen, unseen = ([part[i] for i in draw.permutation(len(part))] for part in (rows[False], rows[True]))
    (folder / "dolly").mkdir(parents=True, exist_ok=True)
    for path, part in (
        ("dolly/test.jsonl", seen[:256]),
        ("dolly/train.jsonl", seen[256:]),
        ("unseen.jsonl", unseen[:256]),
    ):
        (folder / path).write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")


# --- one row ---


def federated(recipe: Any, folder: Path) -> dict[str, Any]:
    """Run a recipe in this process; losses before and after, bytes as they were on the wire, CPU seconds of
    the rounds."""
    from fedtune.errors import FedtuneError
    from fedtune.events import Event, RoundDone
    from fedtune.runtime.finished import installed
    from fedtune.runtime.folder import create
    from fedtune.runtime.run import run

    with tempfile.TemporaryDirectory() as runs:
        place = create(Path(runs), "", "run")
        place.begin(recipe)
        spent = [time.process_time()]

        def tell(event: Event) -> None:
            if isinstance(event, RoundDone):
                spent.append(time.process_time())

        try:
            result = run(recipe, place, tell)
        except FedtuneError as error:
            if error.code != "R408":
                raise
            return {"stopped": str(error)}
        workspace, _, _ = installed(place, data=True)
        seen, unseen = losses(workspace, folder)
    keep = ("up_bytes_per_client_round", "down_bytes_per_client_round", "trainable", "state_sha256")
    return {"seen": seen, "unseen": unseen, "cpu_seconds": round(spent[-1] - spent[0], 1)} | {
        key: result[key] for key in keep
    }


def losses(workspace: Any, folder: Path) -> tuple[float, float]:
    """Held-out loss of the installed model on the seen categories and on the unseen one."""
    from fedtune.model.encode import encode
    from fedtune.model.forward import batch_of, forward_only, mean_loss

    rows = [json.loads(line) for line in (folder / "unseen.jsonl").read_text(encoding="utf-8").splitlines()]
    unseen = encode(rows, workspace.base, max_length=128)
    found = []
    for data in (workspace.test(), unseen):
        with forward_only(workspace.tunable, data):
            parts = [
                mean_loss(
                    workspace.tunable,
                    batch_of(workspace.tunable, data, list(range(i, min(i + 64, len(data))))),
                )
                for i in range(0, len(data), 64)
            ]
        found.append(sum(parts) / len(parts))
    return found[0], found[1]


# --- plain loops ---


def plain(train: Callable[..., None]) -> Callable[[Any, Path], dict[str, Any]]:
    """A federation by hand: the same data, members, weights and number of batches; `train` moves the model in
    place on one client's examples."""

    def play(recipe: Any, folder: Path) -> dict[str, Any]:
        import torch

        from fedtune.aggregate import Mean
        from fedtune.model.fit import step_batches
        from fedtune.model.settings import TrainSettings
        from fedtune.rng import seed_of
        from fedtune.runtime.checkpoints import ClientStates
        from fedtune.runtime.sampling import sample
        from fedtune.runtime.workspace import build_workspace

        workspace = build_workspace(
            recipe, recipe.method.build(recipe.rounds, Mean()), ClientStates(None), lambda event: None
        )
        values = workspace.tunable.parameters()
        began = time.process_time()
        for number in range(1, recipe.rounds + 1):
            members = sample(recipe.sampling, len(workspace.names), recipe.seed, number)
            total = sum(len(workspace.train(member)) for member in members)
            start, mean = (
                [value.detach().clone() for value in values],
                [torch.zeros_like(value) for value in values],
            )
            for member in members:
                data = workspace.train(member)
                seed = seed_of("train", recipe.seed, number, member)
                with torch.no_grad():
                    for value, first in zip(values, start, strict=True):
                        value.copy_(first)
                train(
                    workspace.tunable,
                    data,
                    [
                        list(micro[0])
                        for micro in step_batches(len(data), TrainSettings(steps=50, batch=4), seed)
                    ],
                    seed,
                )
                for part, value in zip(mean, values, strict=True):
                    part += value.detach() * (len(data) / total)
            with torch.no_grad():
                for value, part in zip(values, mean, strict=True):
                    value.copy_(part)
        seen, unseen = losses(workspace, folder)
        up = 4 * sum(value.numel() for value in values)
        return {
            "seen": seen,
            "unseen": unseen,
            "cpu_seconds": round(time.process_time() - began, 1),
            "up_bytes_per_client_round": up,
        }

    return play


def gaussian(tunable: Any, data: Any, batches: list[list[int]], seed: int) -> None:
    """FedKSeed as its authors wrote it: K = 4096 seeds of torch's generator, normal directions a tensor at a
    time, float scalars."""
    import torch

    from fedtune.model.forward import batch_of, forward_only, mean_loss

    draw = torch.Generator().manual_seed(seed % 2**31)

    def move(direction: int, by: float) -> None:
        torch.manual_seed(direction)
        for value in tunable.parameters():
            value.add_(torch.randn(value.shape), alpha=by)

    with forward_only(tunable, data):
        for indices in batches:
            direction, batch = (
                10**6 + int(torch.randint(4096, (1,), generator=draw)),
                batch_of(tunable, data, indices),
            )
            move(direction, 1e-3)
            above = mean_loss(tunable, batch)
            move(direction, -2e-3)
            below = mean_loss(tunable, batch)
            move(direction, 1e-3 - 1e-4 * (above - below) / 2e-3)


def fedavg(tunable: Any, data: Any, batches: list[list[int]], seed: int) -> None:
    """Ten steps of SGD at 0.03."""
    import torch

    from fedtune.model.forward import batch_of
    from fedtune.model.loss import carries, summed_loss

    optimizer = torch.optim.SGD(tunable.parameters(), lr=0.03)
    for indices in batches[:10]:
        batch = batch_of(tunable, data, indices)
        optimizer.zero_grad()
        (summed_loss(tunable, batch)[0] / carries(tunable.base.task, batch)).backward()
        optimizer.step()


PLAIN: dict[str, Callable[[Any, Path], dict[str, Any]]] = {
    "plain torch: Gaussian FedKSeed": plain(gaussian),
    "plain torch: FedAvg, SGD": plain(fedavg),
    "no training": plain(lambda tunable, data, batches, seed: None),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--prepare", type=Path)
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--seeds", nargs="*", type=int, default=[1, 2, 3])
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "fedkseed.json")
    options = parser.parse_args()
    if options.prepare:
        prepare(options.data, options.model, options.prepare)
        return
    from record import hardware

    from fedtune import config

    table: dict[str, Any] = (
        json.loads(options.out.read_text())
        if options.out.exists()
        else {"recipe": "fedkseed.toml", "rows": {}}
    )
    table["hardware"] = hardware()
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        prepare(options.data, options.model, folder)
        for seed in options.seeds:
            for name in options.only or [*ROWS, *PLAIN]:
                known = table["rows"].setdefault(name, {})
                if str(seed) in known and not options.again:
                    continue
                sets = [
                    f"model.name={options.model}",
                    f"data.path={folder / 'dolly'}",
                    "evaluate.base=false",
                    f"seed={seed}",
                ]
                recipe = config.read(str(HERE / "fedkseed.toml"), [*sets, *ROWS.get(name, []), *options.set])
                known[str(seed)] = PLAIN.get(name, federated)(recipe, folder)
                print(name, seed, json.dumps(known[str(seed)]), flush=True)
                options.out.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()

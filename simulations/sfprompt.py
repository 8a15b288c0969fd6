"""SFPrompt on pictures and on text; rows that are recorded already are not run again.

    python simulations/sfprompt.py FOLDER [--only NAME ...] [--seeds 1 2 3] [--set PATH=VALUE] [--results
    FOLDER]
    python simulations/sfprompt.py FOLDER --text ...

Pictures: scikit-learn's digits. A small ViT learns 0 to 4 (and their quarter turns), clients then learn 5 to
9 with it. The first call makes FOLDER/vit
and FOLDER/digits (a few minutes on one core). Variants of sfprompt.toml; kept is the mean accuracy of the
last 5 of 20 rounds.

Text: CLINC150 in FOLDER, a sentence encoder, ten domains are ten clients. Variants of clinc150.toml; kept is
the accuracy after the last round, a
client's share of the work of full fine-tuning by formula, and its memory as `fedtune check` estimates it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from record import HERE, RESULTS, hardware

SKEWED = ["partition.by=dirichlet", "partition.alpha=0.3"]
FULL = ["method.type=fedpeft", "method.adapter.kind=full", "method.train.lr=1e-3"]
PROBE = ["method.type=fedpeft", "method.adapter.kind=head", "method.train.lr=1e-2"]
EDGE = ["method.head=0", "method.tail=0"]  # the client holds embeddings, the last norm and the classifier
DIGITS: dict[str, list[str]] = {
    "full": FULL,
    "head": PROBE,
    "split k=1 m=5": [],
    "all phases": ["method.preset=sfprompt-paper"],
    "random half": ["method.pruning=random", "method.keep=0.5"],
    "k=0 m=6, prompts": EDGE,
    "k=0 m=6, no prompts": [*EDGE, "method.prompts=0"],
    "full, skewed": [*FULL, *SKEWED],
    "head, skewed": [*PROBE, *SKEWED],
    "split k=1 m=5, skewed": SKEWED,
    "all phases, skewed": ["method.preset=sfprompt-paper", *SKEWED],
}
SPLIT = ["method.type=sfprompt", "method.train.lr=1e-3", "method.train.head_lr=5e-2"]
TEXT: dict[str, list[str]] = {
    "full": ["method.adapter.kind=full", "method.train.lr=5e-4", "method.train.head_lr=5e-2"],
    "split k=1 m=3": [*SPLIT, "method.tail=3"],
}
LAST = [
    "evaluate.every=0",
    "evaluate.base=false",
]  # of all variants of text: the score after the last round alone


def pictures(folder: Path) -> None:
    """Digits 5 to 9 as PNG files, one subfolder a class."""
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits

    bunch = load_digits()
    for number, (image, label) in enumerate(zip(bunch.images, bunch.target, strict=True)):
        if label >= 5:
            (folder / str(label)).mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.rint(image * (255 / 16)).astype(np.uint8)).save(
                folder / str(label) / f"{number:04d}.png"
            )


def backbone(folder: Path, epochs: int) -> None:
    """A ViT of 6 blocks of width 64, trained on digits 0 to 4 in four orientations (20 classes), shifted and
    with noise."""
    import torch
    import transformers
    from sklearn.datasets import load_digits

    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        image_size=8,
        patch_size=2,
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_labels=20,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    net = transformers.ViTForImageClassification(config)
    images, labels = (torch.as_tensor(value) for value in load_digits(return_X_y=True))
    images, labels = (images.float().view(-1, 1, 8, 8) / 8 - 1)[labels < 5], labels[labels < 5]
    optimizer = torch.optim.AdamW(net.parameters(), 1e-3, weight_decay=0.05)
    each = len(images) // 64
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=epochs * each)
    for _ in range(epochs):
        for rows in torch.randperm(len(images))[: each * 64].view(each, 64):
            turns = torch.randint(0, 4, (64,))
            moved = torch.roll(images[rows], torch.randint(-1, 2, (2,)).tolist(), (2, 3))
            moved = moved + 0.1 * torch.randn(moved.shape)
            turned = torch.stack(
                [torch.rot90(image, int(turn), (1, 2)) for image, turn in zip(moved, turns, strict=True)]
            )
            optimizer.zero_grad()
            net(pixel_values=turned.expand(-1, 3, -1, -1), labels=labels[rows] * 4 + turns).loss.backward()
            optimizer.step()
            schedule.step()
    net.save_pretrained(folder)
    transformers.ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(folder)


def play(path: str, changes: list[str], seed: int) -> dict[str, Any]:
    """One run: accuracies, and a client's mean bytes in a round, messages and cut apart."""
    from fedtune.config import read
    from fedtune.events import Event, RoundDone, Scored
    from fedtune.runtime.folder import create
    from fedtune.runtime.run import run

    recipe = read(str(HERE / path), [*changes, f"seed={seed}"])
    scores: list[float] = []
    rounds: list[RoundDone] = []

    def tell(event: Event) -> None:
        if isinstance(event, Scored) and event.phase == "federated":
            scores.append(event.value)
        if isinstance(event, RoundDone):
            rounds.append(event)

    with tempfile.TemporaryDirectory() as runs:
        place = create(Path(runs), "", "run")
        place.begin(recipe)
        began = time.process_time()
        result = run(recipe, place, tell)
    cut = statistics.mean(
        one.metrics.get("cut_up_bytes", 0.0) + one.metrics.get("cut_down_bytes", 0.0) for one in rounds
    )
    told = {
        name: statistics.mean(one.metrics[name] for one in rounds)
        for name in sorted(rounds[0].metrics)
        if name.startswith(("body_", "el2n_"))
    }
    sent = result["up_bytes_per_client_round"] + result["down_bytes_per_client_round"]
    return {
        "accuracy": statistics.mean(scores[-5:]),
        "last": scores[-1],
        "best": max(scores),
        "trainable": result["trainable"],
        "message_bytes": sent,
        "cut_bytes": cut,
        **told,
        **client_costs(recipe),
        "cpu_seconds": time.process_time() - began,
    }


def client_costs(recipe: Any) -> dict[str, float]:
    """A client's FLOPs as a share of full fine-tuning's, the parameters that it holds as a share of the
    model's, and its memory, by formula."""
    from fedtune.methods.sfprompt_costs import at_cut
    from fedtune.methods.sfprompt_net import cut_bench
    from fedtune.model.memory_plan import weightless
    from fedtune.runtime.check import check

    checked = check(recipe)
    memory = {"client_memory_bytes": float(sum(checked.memory.values()))}
    if recipe.method.type != "sfprompt":
        whole = float(recipe.method.adapter.kind == "full")
        return {**memory, "client_flops": whole, "client_parameters": 1.0} if whole else memory
    if recipe.data.task == "image-classify":
        return memory
    net = cut_bench(
        weightless(recipe.model, recipe.data.task, len(checked.federation.labels)), recipe.method, 0
    ).net
    cost = at_cut(recipe.method, net, recipe.data.max_length)[1]
    return {**memory, "client_flops": cost.share_flops, "client_parameters": cost.share_parameters}


def places(folder: Path, text: bool, epochs: int) -> list[str]:
    """Where model and data are, made if need be."""
    if text:
        return [f"data.path={folder}"]
    if not (folder / "digits").exists():
        pictures(folder / "digits")
    if not (folder / "vit").exists():
        backbone(folder / "vit", epochs)
    return [f"model.name={folder / 'vit'}", f"data.path={folder / 'digits'}"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--text", action="store_true")
    parser.add_argument("--only", nargs="*", choices=[*DIGITS, *TEXT])
    parser.add_argument("--seeds", type=int, nargs="*", default=[1, 2, 3])
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument(
        "--epochs",
        type=int,
        default=110,
        help="of the backbone on the digits 0 to 4, where it is not there yet",
    )
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="where the table is kept (default: simulations/results)"
    )
    options = parser.parse_args()
    recipe, name, variants = (
        ("clinc150.toml", "sfprompt-clinc150", TEXT)
        if options.text
        else ("sfprompt.toml", "sfprompt-digits", DIGITS)
    )
    results, shared = (
        options.results / f"{name}.json",
        [*places(options.folder, options.text, options.epochs), *(LAST if options.text else [])],
    )
    table: dict[str, Any] = json.loads(results.read_text()) if results.exists() else {"rows": {}}
    table["hardware"] = hardware()
    for seed in options.seeds:
        for row in options.only or variants:
            runs = table["rows"].setdefault(row, {})
            if str(seed) in runs:
                continue
            runs[str(seed)] = play(recipe, [*shared, *variants[row], *options.set], seed)
            results.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
            print(
                f"{row:<26}seed {seed}: {runs[str(seed)]['accuracy']:.3f}, "
                f"{runs[str(seed)]['message_bytes'] + runs[str(seed)]['cut_bytes']:,.0f} bytes"
            )
            sys.stdout.flush()


if __name__ == "__main__":
    main()

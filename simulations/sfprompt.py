"""SFPrompt on scikit-learn's digits: a small ViT learns 0 to 4 (and their quarter turns), clients then learn 5 to 9 with it.

    python simulations/sfprompt.py FOLDER [--only NAME ...] [--seeds 1 2 3]

The first call makes FOLDER/vit and FOLDER/digits (a few minutes on one core). Every variant is simulations/sfprompt.toml with overrides; what is kept
is the mean accuracy of the last 5 of 20 rounds, in simulations/results/sfprompt-digits.json. Rows that are there already are not run again.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "sfprompt-digits.json"
SKEWED = ["partition.by=dirichlet", "partition.alpha=0.3"]
FULL = ["method.type=fedpeft", "method.adapter.kind=full", "method.train.lr=1e-3"]
PROBE = ["method.type=fedpeft", "method.adapter.kind=head", "method.train.lr=1e-2"]
EDGE = ["method.head=0", "method.tail=0"]  # the client holds embeddings, the last norm and the classifier
VARIANTS: dict[str, list[str]] = {
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


def pictures(folder: Path) -> None:
    """Digits 5 to 9 as PNG files, one subfolder a class."""
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits

    bunch = load_digits()
    for number, (image, label) in enumerate(zip(bunch.images, bunch.target, strict=True)):
        if label >= 5:
            (folder / str(label)).mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.rint(image * (255 / 16)).astype(np.uint8)).save(folder / str(label) / f"{number:04d}.png")


def backbone(folder: Path, epochs: int = 110) -> None:
    """A ViT of 6 blocks of width 64, trained on digits 0 to 4 in four orientations (20 classes), shifted and with noise."""
    import torch
    import transformers
    from sklearn.datasets import load_digits

    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        image_size=8, patch_size=2, hidden_size=64, intermediate_size=256, num_hidden_layers=6, num_attention_heads=4, num_labels=20,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
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
            turned = torch.stack([torch.rot90(image, int(turn), (1, 2)) for image, turn in zip(moved, turns, strict=True)])
            optimizer.zero_grad()
            net(pixel_values=turned.expand(-1, 3, -1, -1), labels=labels[rows] * 4 + turns).loss.backward()
            optimizer.step()
            schedule.step()
    net.save_pretrained(folder)
    transformers.ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(folder)


def play(folder: Path, changes: list[str], seed: int) -> dict[str, Any]:
    """One run: mean accuracy of the last 5 rounds, and a client's mean bytes in a round, messages and cut together."""
    from fedtune.config import read
    from fedtune.events import Event, RoundDone, Scored
    from fedtune.runtime.folder import create
    from fedtune.runtime.run import run

    places = [f"model.name={folder / 'vit'}", f"data.path={folder / 'digits'}", f"seed={seed}"]
    recipe = read(str(HERE / "sfprompt.toml"), [*changes, *places])
    scores: list[float] = []
    rounds: list[RoundDone] = []

    def tell(event: Event) -> None:
        if isinstance(event, Scored) and event.phase == "federated":
            scores.append(event.value)
        if isinstance(event, RoundDone):
            rounds.append(event)

    with tempfile.TemporaryDirectory() as runs:
        place = create(Path(runs), "", "digits")
        place.begin(recipe)
        began = time.process_time()
        result = run(recipe, place, tell)
    cut = statistics.mean(one.metrics.get("cut_up_bytes", 0.0) + one.metrics.get("cut_down_bytes", 0.0) for one in rounds)
    told = {name: statistics.mean(one.metrics[name] for one in rounds) for name in sorted(rounds[0].metrics) if name.startswith(("body_", "el2n_"))}
    sent = result["up_bytes_per_client_round"] + result["down_bytes_per_client_round"]
    return {
        "accuracy": statistics.mean(scores[-5:]), "last": scores[-1], "best": max(scores), "trainable": result["trainable"],
        "message_bytes": sent, "cut_bytes": cut, **told, "cpu_seconds": time.process_time() - began,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", nargs="*", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--seeds", type=int, nargs="*", default=[1, 2, 3])
    options = parser.parse_args()
    if not (options.folder / "digits").exists():
        pictures(options.folder / "digits")
    if not (options.folder / "vit").exists():
        backbone(options.folder / "vit")
    table: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"hardware": f"{platform.machine()}, CPU", "rows": {}}
    for seed in options.seeds:
        for name in options.only:
            runs = table["rows"].setdefault(name, {})
            if str(seed) in runs:
                continue
            runs[str(seed)] = play(options.folder, VARIANTS[name], seed)
            RESULTS.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
            print(f"{name:<26}seed {seed}: {runs[str(seed)]['accuracy']:.3f}, {runs[str(seed)]['message_bytes'] + runs[str(seed)]['cut_bytes']:,.0f} bytes")
            sys.stdout.flush()


if __name__ == "__main__":
    main()

"""Rows and pictures of SFPrompt's tests."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from tests import small


def write_sentences(folder: Path) -> Path:
    """Sentences of 3 to 7 words, so that batches hold padding."""
    path = folder / "rows.jsonl"
    cut = [
        {**row, "text": " ".join(row["text"].split()[: 3 + number % 5])}
        for number, row in enumerate(small.rows())
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in cut))
    return path


def write_images(folder: Path) -> Path:
    """Two classes of grey noise, one darker."""
    draw = np.random.default_rng(0)
    for number in range(40):
        (folder / "ab"[number % 2]).mkdir(exist_ok=True)
        Image.fromarray(draw.integers(0, (128, 256)[number % 2], (8, 8), dtype=np.uint8)).save(
            folder / "ab"[number % 2] / f"{number}.png"
        )
    return folder

"""Images: resized once to what the model sees and kept as bytes; scaled to numbers batch by batch (a quarter
of the memory)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from fedtune.errors import FedtuneError
from fedtune.images import to_eight_bits


def resized(image: Any, processor: Any, number: int) -> np.ndarray:
    """A path, PIL image or uint8 array (height, width[, channels]) -> uint8 (3, height, width) by the model's
    own processor."""
    try:
        if isinstance(image, (str, Path)):
            with Image.open(image) as opened:
                picture = to_eight_bits(opened).convert("RGB")
        elif isinstance(image, Image.Image):
            picture = to_eight_bits(image).convert("RGB")
        else:
            array = np.asarray(image)
            if array.dtype != np.uint8:
                raise ValueError(f"an array of {array.dtype}, not uint8")
            picture = Image.fromarray(
                array.squeeze(-1) if array.ndim == 3 and array.shape[-1] == 1 else array
            ).convert("RGB")
    except (OSError, ValueError, TypeError, Image.DecompressionBombError) as error:
        raise FedtuneError(
            "D203",
            f"row {number} whose image{f' {image}' if isinstance(image, str) else ''} cannot be read "
            f"({str(error)[:120]})",
            "a file that Pillow reads or a uint8 array (height, width[, 3])",
            "correct or remove the row",
        ) from error
    return np.asarray(
        processor(images=[picture], return_tensors="np", do_rescale=False, do_normalize=False)[
            "pixel_values"
        ][0],
        np.uint8,
    )


def collate(examples: Sequence[Mapping[str, np.ndarray]], processor: Any) -> dict[str, torch.Tensor]:
    """pixel_values (examples, 3, height, width) float32, rescaled and normalised as the processor says;
    labels (examples,)."""
    values = np.stack([e["pixels"] for e in examples]).astype(np.float32)
    if processor.do_rescale:
        values = values * np.float32(processor.rescale_factor)
    if processor.do_normalize:
        mean, std = (
            np.asarray(x, np.float32).reshape(1, -1, 1, 1)
            for x in (processor.image_mean, processor.image_std)
        )
        values = (values - mean) / std
    return {
        "pixel_values": torch.from_numpy(values),
        "labels": torch.tensor([int(e["labels"]) for e in examples]),
    }

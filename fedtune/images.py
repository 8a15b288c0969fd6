"""One way to 8 bits for pictures from any source: a pixel that does not fit is refused, never clamped."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

WIDE = (
    "I",
    "F",
)  # Pillow's modes of more than 8 bits a channel begin with these; convert("RGB") would clamp them at 255


def to_eight_bits(picture: Image) -> Image:
    """The first frame, upright as the camera held it, in mode L or RGB; transparent parts are white. Raises
    ValueError for deeper pixels."""
    from PIL import Image, ImageOps

    if picture.mode.startswith(WIDE):
        raise ValueError(
            f"pixels of mode {picture.mode}, which do not fit in 8 bits: scale them to 0..255 first"
        )
    upright = ImageOps.exif_transpose(picture)
    if upright.mode in ("RGBA", "LA", "PA") or "transparency" in upright.info:
        clear = upright.convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", clear.size, "white"), clear)
    return upright if upright.mode == "L" else upright.convert("RGB")

"""A figure as SVG inside a page, or as a picture of points.

For a page it is drawn in colours that only stand for something; in the SVG each becomes a CSS variable, so
that one drawing fits a light page, a dark one and paper. Text stays text.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DASHES = ("-", "--", ":", "-.")  # beside the colours, for those who see none
WIDTH = 4.8  # inches of 72 points: legible on a telephone, and it fills a column of a wide screen
SIZE = (WIDTH, 3.1)


@dataclass(frozen=True)
class Palette:
    """Colours, as #rrggbb; those of `series` are told apart by all eyes."""

    ink: str
    faint: str
    grid: str
    paper: str
    series: tuple[str, ...]

    @property
    def names(self) -> dict[str, str]:
        """CSS variable -> colour."""
        named = {"--ink": self.ink, "--faint": self.faint, "--grid": self.grid, "--paper": self.paper}
        return named | {f"--c{number}": colour for number, colour in enumerate(self.series)}

    def css(self) -> str:
        return ";".join(f"{name}:{colour}" for name, colour in self.names.items())


LIGHT = Palette(
    "#1b1f24", "#57606a", "#d0d7de", "#ffffff",
    ("#0b62ad", "#b84300", "#007a57", "#8a3a8f", "#7a6000", "#4a5568", "#00707f", "#b0124c"),
)  # fmt: skip
DARK = Palette(
    "#e6edf3", "#9aa7b4", "#3a424c", "#0d1117",
    ("#6cb6ff", "#ffa066", "#57d9a3", "#d8a0e8", "#e6c84f", "#b0bac6", "#5fd4e0", "#ff8fb0"),
)  # fmt: skip
STANDING = Palette(
    "#010203", "#010204", "#010205", "#010206", tuple(f"#0102{n:02x}" for n in range(0x10, 0x18))
)

Draw = Callable[[Palette], "Figure"]


def style(palette: Palette) -> dict[str, Any]:
    """Matplotlib's settings for every figure."""
    from cycler import cycler

    return {
        "svg.fonttype": "none",
        "svg.hashsalt": "fedtune",
        "text.parse_math": False,  # a client may be called $x$
        "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans"],
        "font.size": 11,
        "text.color": palette.ink,
        "axes.labelcolor": palette.faint,
        "axes.edgecolor": palette.grid,
        "axes.facecolor": "none",
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.prop_cycle": cycler(color=palette.series),
        "axes.formatter.useoffset": False,
        "grid.color": palette.grid,
        "grid.linewidth": 0.7,
        "xtick.color": palette.grid,
        "ytick.color": palette.grid,
        "xtick.labelcolor": palette.faint,
        "ytick.labelcolor": palette.faint,
        "figure.facecolor": "none",
        "figure.figsize": SIZE,
        "figure.constrained_layout.use": True,
        "legend.frameon": False,
        "legend.fontsize": 10,
        "lines.linewidth": 2.0,
        "lines.markersize": 4,
    }


def svg(draw: Draw, prefix: str, alt: str) -> str:
    """An <svg> element for a page of HTML; `prefix` keeps its names apart from those of other figures, `alt`
    is what it says to who does not see it."""
    from matplotlib import rc_context

    buffer = io.StringIO()
    with rc_context(style(STANDING)):
        draw(STANDING).savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    opening, _, rest = text.partition(">")
    opening = re.sub(r' (xmlns(:\w+)?|width|height|version)="[^"]*"', "", opening)
    rest = re.sub(r'\bid="', f'id="{prefix}-', rest)
    rest = rest.replace("url(#", f"url(#{prefix}-").replace('xlink:href="#', f'xlink:href="#{prefix}-')
    rest = re.sub(r"font-family: [^;\"]*;?", "", rest)  # the page's own
    rest = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", rest)
    for name, colour in STANDING.names.items():
        rest = rest.replace(colour, f"var({name})")
    label = f' role="img" aria-label="{html.escape(alt, quote=True)}">'
    return (opening + label + rest).strip()


def png(draw: Draw, palette: Palette = LIGHT) -> bytes:
    from matplotlib import rc_context

    buffer = io.BytesIO()
    with rc_context(style(palette)):
        draw(palette).savefig(buffer, format="png", dpi=160, facecolor=palette.paper)
    return buffer.getvalue()

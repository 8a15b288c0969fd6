"""A picture with what it says in words and in numbers, and what charts have in common."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fedtune.report.picture import DASHES, Draw, Palette
from fedtune.report.read import RunData

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Curve = Sequence[tuple[float, float]]  # (x, y), x ascending
LONGEST = 28  # characters of a name beside a picture
SHORT = 22  # characters of names that stand in two columns


@dataclass(frozen=True)
class Chart:
    """One figure of a page.

    slug  names its files; alt  is a sentence; head, rows  are the numbers; about  says how to read it
    """

    slug: str
    title: str
    alt: str
    draw: Draw
    head: tuple[str, ...]
    rows: Sequence[Sequence[str]]
    about: str = ""
    wide: bool = False


@dataclass(frozen=True)
class Group:
    """Runs that differ by their seeds alone."""

    name: str
    runs: tuple[RunData, ...]

    def band(self, curves: Sequence[Curve]) -> list[tuple[float, float, float, float]]:
        """(x, mean, least, most) over the runs that have a value there."""
        at: dict[float, list[float]] = {}
        for curve in curves:
            for x, y in curve:
                at.setdefault(x, []).append(y)
        return [(x, statistics.fmean(ys), min(ys), max(ys)) for x, ys in sorted(at.items())]


def draw_band(
    axes: Axes, palette: Palette, number: int, label: str, band: Sequence[tuple[float, float, float, float]]
) -> None:
    """A line through the means and, where runs differ, what lies between the least and the most."""
    colour = palette.series[number % len(palette.series)]
    xs = [point[0] for point in band]
    axes.plot(
        xs, [point[1] for point in band], DASHES[number // len(palette.series) % len(DASHES)],
        color=colour, label=label, marker="o" if len(xs) < 16 else None,
    )  # fmt: skip
    if any(low < high for _, _, low, high in band):
        axes.fill_between(xs, [p[2] for p in band], [p[3] for p in band], color=colour, alpha=0.18, lw=0)


def whole_rounds(axes: Axes) -> None:
    """Rounds are whole numbers on the x axis."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("round")


def factors(axes: Axes) -> None:
    """A logarithmic x axis with plain numbers: Matplotlib's own labels are formulas, which are not read here
    (picture.style)."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def legend_above(figure: Figure, axes: Axes) -> None:
    """Names above a picture, in two columns where they are short; the picture grows with them."""
    names = axes.get_legend_handles_labels()[1]
    if names:
        columns = 2 if max(map(len, names)) <= SHORT else 1
        figure.set_figheight(figure.get_figheight() + 0.2 * max(0, math.ceil(len(names) / columns) - 1))
        figure.legend(loc="outside upper center", ncols=columns)


def number(value: Any, digits: int = 4) -> str:
    """
    >>> number(0.25), number(3), number(None), number(1234567.0)
    ('0.25', '3', '', '1.235e+06')
    """
    if value is None or isinstance(value, (str, bool)):
        return "" if value is None else str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.{digits}g}"


def brief(name: str, most: int = LONGEST) -> str:
    """
    >>> brief("a-long-name-of-a-client", 10)
    'a-long-na…'
    """
    from fedtune.plain import plain

    text = plain(name)
    return text if len(text) <= most else text[: most - 1] + "…"

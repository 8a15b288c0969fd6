"""The pages' figures: docs/pictures/round.svg, one round of a federation. Text stays text, so that it can be searched
and read aloud; the same versions of Matplotlib draw the same bytes."""

from __future__ import annotations

import io
from typing import Any

INK, LINE, SERVER, CLIENT = "#1f2933", "#52606d", "#d5ece8", "#e8eef7"
DOWN, UP = "#0b6e5f", "#a3480f"
CLIENTS = ("hospital A", "hospital B", "hospital C")


def generate() -> dict[str, str]:
    return {"docs/pictures/round.svg": a_round()}


def a_round() -> str:
    """Coordinator on the left, clients on the right; numbers are those of the text in docs/concepts.md."""
    figure, axes = canvas(10.4, 5.6)
    box(axes, 0.1, 0.3, 3.1, 5.0, SERVER, "coordinator")
    steps = (
        (4.35, "1", "draw this round's members"),
        (3.55, "2", "send the shared state"),
        (1.95, "6", "undo the chain, add up"),
        (1.15, "7", "new state; commit round"),
    )
    for height, number, text in steps:
        step(axes, 0.4, height, number, text)
    for at, name in enumerate(CLIENTS):
        top = 5.3 - 1.72 * at
        box(axes, 5.9, top - 1.56, 4.4, 1.56, CLIENT, f"client: {name}")
        step(axes, 6.1, top - 0.7, "3", "train on its own rows")
        step(axes, 6.1, top - 1.22, "4", "chain: clip, compress, mask")
        axes.text(
            9.65,
            top - 0.9,
            "rows\nstay here",
            ha="center",
            va="center",
            fontsize=9,
            color=LINE,
            style="italic",
        )
        arrow(axes, (3.25, 3.55), (5.85, top - 0.6), DOWN)
        arrow(axes, (5.85, top - 1.1), (3.25, 1.95), UP)
    label(axes, 4.55, 4.9, "2  state: the adapter's numbers", DOWN)
    label(axes, 4.55, 0.55, "5  update: what training changed", UP)
    return svg(figure, "One round: the coordinator draws members and sends them the shared state; each client trains "
                       "on its own rows and sends an update through the chain; the coordinator adds up.")  # fmt: skip


def canvas(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), facecolor="white")
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.axis("off")
    return figure, axes


def box(
    axes: Any, left: float, bottom: float, width: float, height: float, colour: str, title: str = ""
) -> None:
    from matplotlib.patches import FancyBboxPatch

    style = "round,pad=0,rounding_size=0.12"
    axes.add_patch(
        FancyBboxPatch((left, bottom), width, height, style, facecolor=colour, edgecolor=LINE, zorder=3)
    )
    axes.text(
        left + 0.2,
        bottom + height - 0.27,
        title,
        fontsize=11,
        weight="bold",
        color=INK,
        va="center",
        zorder=4,
    )


def step(axes: Any, left: float, height: float, number: str, text: str) -> None:
    axes.text(left, height, number, fontsize=11, weight="bold", color=LINE, va="center", zorder=4)
    axes.text(left + 0.25, height, text, fontsize=10.5, color=INK, va="center", zorder=4)


def label(axes: Any, middle: float, height: float, text: str, colour: str) -> None:
    axes.text(middle, height, text, fontsize=9.5, weight="bold", color=colour, ha="center", va="center",
              bbox={"facecolor": "white", "edgecolor": "none", "pad": 2})  # fmt: skip


def arrow(axes: Any, start: tuple[float, float], end: tuple[float, float], colour: str) -> None:
    axes.annotate("", end, start, arrowprops={"arrowstyle": "->", "color": colour, "lw": 1.4})


def svg(figure: Any, title: str) -> str:
    import matplotlib

    file = io.StringIO()
    with matplotlib.rc_context(
        {"svg.hashsalt": "fedtune", "svg.fonttype": "none", "font.family": "sans-serif"}
    ):
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Title": title})
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines()) + "\n"

"""What a benchmark ends with: a list of claims in one line of JSON."""

from __future__ import annotations


def claim(text: str, ours: float, other: float, ratio: float, goal: str, met: bool) -> dict[str, object]:
    """A comparison that somebody may doubt: both figures, their ratio, what it should be, and whether it is."""
    figures = {
        name: float(f"{value:.4g}") for name, value in (("ours", ours), ("other", other), ("ratio", ratio))
    }
    return {"claim": text, **figures, "goal": goal, "met": bool(met)}


def at_most(text: str, ours: float, other: float, most: float) -> dict[str, object]:
    """A claim that ours / other is at most a number."""
    return claim(text, ours, other, ours / other, f"<= {most:g}", ours / other <= most)


def at_least(text: str, ours: float, other: float, least: float) -> dict[str, object]:
    """A claim that other / ours, how many times less ours is, is at least a number."""
    return claim(text, ours, other, other / ours, f">= {least:g}", other / ours >= least)

"""PVI: rows whose prompt says little about their response are left out, or come late."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from fedtune.selection.base import Holder, Row, Selection


class Pvi(Selection):
    """by = "pvi": pointwise V-information of a row, log2 p(response | prompt) - log2 p(response | empty
    prompt) (Ethayarajh et al. 2022, arXiv:2110.08420, eq. 4), where p is the base model for both: two forward
    passes a row, once."""

    by: Literal["pvi"] = "pvi"
    reads: ClassVar[bool] = True
    drop: float = Field(0.1, ge=0, lt=1)
    """Share of the rows that is left out: those with the least PVI. 0 leaves out none."""
    order: bool = False
    """Put the rows that stay in the order of their PVI, the greatest first, for [method.train.curriculum]."""

    @property
    def idle(self) -> bool:
        return not self.drop and not self.order

    @property
    def orders(self) -> bool:
        return self.order

    def choose(self, rows: Sequence[Row], holder: Holder) -> tuple[list[dict[str, Any]], str]:
        values = pvi(rows, holder)
        out = int(self.drop * len(rows))
        rising = np.argsort(values, kind="stable")  # of equal ones the first in the file
        kept = rising[out:][::-1] if self.order else np.sort(rising[out:])
        said = f"{out} of {len(rows)} rows left out, of PVI {mean_of(values[rising[:out]])} bits on average"
        return [dict(rows[number]) for number in kept.tolist()], said + "; the others in order" * self.order


def pvi(rows: Sequence[Row], holder: Holder) -> np.ndarray:
    """Bits of each row, (rows,) float64, over the tokens of its response that both have: data.max_length may
    cut it shorter behind its prompt, and without one nothing may stand before the first. 0 without any."""
    from fedtune.model.likelihood import response_bits

    with_prompt = response_bits(holder.base, rows, holder.how)
    without = response_bits(holder.base, [unprompted(row) for row in rows], holder.how)
    pairs = zip(with_prompt, without, strict=True)
    return np.asarray([np.nansum(one[: len(other)] - other[: len(one)]) for one, other in pairs])


def unprompted(row: Row) -> dict[str, Any]:
    """The row with nothing said before its responses."""
    if "messages" not in row:
        return {**row, "prompt": ""}
    return {
        **row,
        "messages": [
            message if message["role"] == "assistant" else {**message, "content": ""}
            for message in row["messages"]
        ],
    }


def mean_of(values: np.ndarray) -> str:
    return f"{values.mean():.2f}" if len(values) else "-"

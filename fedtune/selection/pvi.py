"""PVI: rows whose prompt says little about their response are left out."""

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

    @property
    def idle(self) -> bool:
        return not self.drop

    def choose(self, rows: Sequence[Row], holder: Holder) -> tuple[list[dict[str, Any]], str]:
        values = pvi(rows, holder)
        out = int(self.drop * len(rows))
        last = np.argsort(values, kind="stable")[:out]  # of equal ones the first in the file
        left_out = set(last.tolist())
        kept = [dict(row) for number, row in enumerate(rows) if number not in left_out]
        return kept, f"{out} of {len(rows)} rows left out, of PVI {mean_of(values[last])} bits on average"


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

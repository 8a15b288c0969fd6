"""S3FT: where the model already answers rightly in its own words, it is trained on those."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from fedtune.errors import ClientFailed
from fedtune.metrics.answer import Answer
from fedtune.metrics.exact_match import ExactMatch
from fedtune.selection.base import Holder, Row, Selection

AT_ONCE = 32  # prompts between two signs of life
Judge = Annotated[ExactMatch | Answer, Field(discriminator="metric")]


class S3ft(Selection):
    """by = "s3ft": the base model answers every prompt once, greedily; where the judge takes its answer for
    the wanted one, it stands in for the response (selective self-to-supervised fine-tuning, Gupta et al.
    2025, arXiv:2502.08130, without its paraphrases)."""

    by: Literal["s3ft"] = "s3ft"
    reads: ClassVar[bool] = True
    judge: Judge = ExactMatch()
    """Who says whether an answer is right: metric = "exact-match", or metric = "answer" with a pattern, as in
    [[metrics]]."""
    tokens: int = Field(128, ge=0, le=4096)
    """Longest answer of the model's own; 0 asks for none."""

    @property
    def idle(self) -> bool:
        return not self.tokens

    @property
    def longer(self) -> int:
        return self.tokens

    def choose(self, rows: Sequence[Row], holder: Holder) -> tuple[list[dict[str, Any]], str]:
        said = own_answers(rows, holder, self.tokens)
        taken = [
            bool(one) and self.accepts(one, response_of(row)) for one, row in zip(said, rows, strict=True)
        ]
        if not any(taken):
            raise ClientFailed(
                "D209",
                f"a judge (metric = '{self.judge.metric}') that accepts none of {len(rows)} own answers",
                "some that it accepts",
                "change judge or tokens of by = 's3ft', or remove it",
            )
        made = [
            answered(row, one) if own else dict(row) for row, one, own in zip(rows, said, taken, strict=True)
        ]
        return made, f"{sum(taken)} of {len(rows)} responses replaced by the model's own"

    def accepts(self, said: str, wanted: str) -> bool:
        return any(value == 1.0 for value in self.judge.measure([said], [wanted]).values())


def own_answers(rows: Sequence[Row], holder: Holder, tokens: int) -> list[str]:
    """What the base model says to each prompt; "" where a row asks nothing."""
    from fedtune.model.generate import generated, questions

    how = holder.how
    asked = [questions([row], holder.base, how["template"], how["system"], how["day"])[:1] for row in rows]
    there = [number for number, one in enumerate(asked) if one]
    said: dict[int, str] = {}
    for start in range(0, len(there), AT_ONCE):
        some = there[start : start + AT_ONCE]
        said |= zip(some, generated(holder.base, [asked[n][0] for n in some], tokens), strict=True)
        how["alive"]()
    return [said.get(number, "") for number in range(len(rows))]


def response_of(row: Row) -> str:
    from fedtune.model.generate import wanted_of

    return wanted_of(row)


def answered(row: Row, said: str) -> dict[str, Any]:
    """The row with another last response, behind the blanks that the old one began with."""
    old = response_of(row)
    new = old[: len(old) - len(old.lstrip())] + said
    if "messages" not in row:
        return {**row, "response": new}
    last = max(n for n, message in enumerate(row["messages"]) if message["role"] == "assistant")
    return {
        **row,
        "messages": [
            {**message, "content": new} if number == last else message
            for number, message in enumerate(row["messages"])
        ],
    }

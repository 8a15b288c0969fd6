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
    2025, arXiv:2502.08130). Where not, a paraphrase of the response by the model may, if it is asked for
    one."""

    by: Literal["s3ft"] = "s3ft"
    reads: ClassVar[bool] = True
    judge: Judge = ExactMatch()
    """Who says whether an answer is right: metric = "exact-match", or metric = "answer" with a pattern, as in
    [[metrics]]."""
    tokens: int = Field(128, ge=0, le=4096)
    """Longest answer of the model's own; 0 asks for none."""
    paraphrase: str = Field("", max_length=2000, pattern=r"^$|\{response\}")
    """What the model is asked where its own answer is refused, with the wanted one for {response}, such as
    "Say this in your own words: {response}". What it says stands in where the judge accepts that. "" asks
    nothing."""

    @property
    def idle(self) -> bool:
        return not self.tokens

    @property
    def longer(self) -> int:
        return self.tokens

    def choose(self, rows: Sequence[Row], holder: Holder) -> tuple[list[dict[str, Any]], str]:
        wanted = [response_of(row) for row in rows]
        said = self.accepted(own_answers(rows, holder, self.tokens), wanted)
        own = sum(map(bool, said))
        left = [number for number, one in enumerate(said) if not one]
        if self.paraphrase and left:
            golden = [wanted[number] for number in left]
            asked = [asking(rows[n], self.paraphrase, one) for n, one in zip(left, golden, strict=True)]
            again = self.accepted(own_answers(asked, holder, self.tokens), golden)
            for number, one in zip(left, again, strict=True):
                said[number] = one
        if not any(said):
            raise ClientFailed(
                "D209",
                f"a judge (metric = '{self.judge.metric}') that accepts none of {len(rows)} own answers",
                "some that it accepts",
                "change judge or tokens of by = 's3ft', or remove it",
            )
        made = [answered(row, one) if one else dict(row) for row, one in zip(rows, said, strict=True)]
        more = f", {sum(map(bool, said)) - own} by its paraphrases" if self.paraphrase else ""
        return made, f"{own} of {len(rows)} responses replaced by the model's own{more}"

    def accepted(self, said: Sequence[str], wanted: Sequence[str]) -> list[str]:
        """The answers, "" in the place of those that the judge refuses."""
        pairs = zip(said, wanted, strict=True)
        return [one if one and self.accepts(one, other) else "" for one, other in pairs]

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


def asking(row: Row, paraphrase: str, wanted: str) -> dict[str, Any]:
    """A row that asks for the wanted response in other words."""
    text = paraphrase.replace("{response}", wanted)
    if "messages" not in row:
        return {**row, "prompt": text}
    said = [{"role": "user", "content": text}, {"role": "assistant", "content": wanted}]
    return {**row, "messages": said}


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

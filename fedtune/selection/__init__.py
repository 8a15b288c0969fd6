"""Which of its rows a client trains on, and how they are worded: before the first round, at the client. One
file a selection, a table of [[select]] in a recipe; its place in this union registers a class, and nothing
else does. No torch at import."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from fedtune.plugins import extended
from fedtune.selection.base import Holder, Row, Selection
from fedtune.selection.group import Group
from fedtune.selection.pvi import Pvi
from fedtune.selection.s3ft import S3ft
from fedtune.settings import classes_by_tag

SelectTable = Annotated[Group | Pvi | S3ft, Field(discriminator="by")]
if not TYPE_CHECKING:
    SelectTable = extended(SelectTable, "by", "selections", Selection)

SELECTIONS: dict[str, type[Selection]] = classes_by_tag(SelectTable, "by")

__all__ = ["SELECTIONS", "Holder", "SelectTable", "Selection", "selected", "telling"]


def selected(
    chosen: Sequence[Selection], rows: Sequence[Row], holder: Holder, tell: Callable[[str], None]
) -> list[dict[str, Any]]:
    """The rows that the selections leave, one after the other; `tell` hears what each did. Raises
    ClientFailed D209."""
    made = [dict(row) for row in rows]
    for one in chosen:
        if not one.idle:
            made, said = one.choose(made, holder)
            tell(f"[[select]] by = '{one.by}': {said}")
    return made


def telling(chosen: Sequence[Selection]) -> dict[str, str]:
    """What the server learns of a selection, for the exposure table."""
    names = ", ".join(one.by for one in chosen)
    what = (
        f"of {names}: nothing of which rows a client took or how they are worded, but that a weight by rows "
        "or tokens counts those that it took"
    )
    return {"selection": what} if chosen else {}

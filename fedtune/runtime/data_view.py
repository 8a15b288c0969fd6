"""What the loader sees of some data: columns, labels, what stands twice or is left out, lengths in a model's
tokens, and the first examples as the model is given them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fedtune.config import Recipe
from fedtune.data import Rows, histogram
from fedtune.data.federation import key_of, odd_labels
from fedtune.data.rows import clean, why_blank
from fedtune.plain import plain
from fedtune.runtime.workspace import how_to_encode

if TYPE_CHECKING:
    from fedtune.model.look import Looked

TRIED = 2000  # rows that go through the tokenizer: a second or two
FEW = 12  # labels that are shown, and characters of a bar
WIDTH = 60  # characters of a cell that are shown


@dataclass(frozen=True)
class ColumnSeen:
    """One column: the types of its values, how many rows have one, how many differ, and the first."""

    name: str
    types: tuple[str, ...]
    filled: int
    different: int
    first: Any


@dataclass(frozen=True)
class DataSeen:
    """A data set through a recipe's [data] and [model]."""

    recipe: Recipe
    where: str
    read: int  # rows that the source gave
    test: int | None  # rows of the source's own test set
    columns: list[ColumnSeen]
    rows: Rows  # in the task's shape
    dropped: Mapping[str, int]
    twice: int  # rows that an earlier one equals
    notes: tuple[str, ...]
    looked: Looked


def seen(recipe: Recipe, examples: int = 3) -> DataSeen:
    """Reads the rows, and of the model config.json and tokenizer. Raises D201 to D208, M301, M307."""
    from fedtune.model.look import look

    data = recipe.data
    table = data.table()
    known = clean(data, table.rows, table.where, table.folder)
    dropped = dict(table.dropped) | ({why_blank(data): known.blank} if known.blank else {})
    labels = tuple(data.labels or histogram(known.rows))
    tried = known.rows[:TRIED]
    return DataSeen(
        recipe,
        table.where,
        len(table.rows),
        None if table.test is None else len(table.test),
        columns_of(table.rows),
        known.rows,
        dropped,
        len(known.rows) - len({key_of(row) for row in known.rows}),
        (*table.notes, *odd_labels(known.rows)),
        look(recipe.model, data.task, labels, tried, examples, **how_to_encode(data)),
    )


def columns_of(rows: Rows) -> list[ColumnSeen]:
    found = []
    for name in dict.fromkeys(name for row in rows for name in row):
        values = [row[name] for row in rows if row.get(name) not in (None, "")]
        types = Counter(type(value).__name__ for value in values)
        different = len({repr(value) for value in values})
        found.append(
            ColumnSeen(str(name), tuple(types), len(values), different, values[0] if values else None)
        )
    return found


def lines(view: DataSeen, colour: bool = False) -> Iterator[str]:
    """The view as lines of text. colour: what carries loss is green; otherwise it stands in «»."""
    data = view.recipe.data
    test = f", {view.test:,} more in its test set" if view.test is not None else ""
    yield f"data      {view.where} ({data.source}): {view.read:,} rows{test}"
    wide = max((len(column.name) for column in view.columns), default=0)
    for column in view.columns:
        yield (
            f"  {plain(column.name):<{wide}}  {' or '.join(column.types) or 'nothing':<5} "
            f"{column.filled:>7,} filled {column.different:>7,} different  {shortened(column.first)}"
        )
    taken = ", ".join(f"{key} = {value!r}" for key, value in used(view.recipe).items())
    yield f"task      {data.task}: {taken}"
    yield from (f"left out  {count:,} rows: {reason}" for reason, count in view.dropped.items())
    if view.twice:
        yield f"twice     {view.twice:,} rows equal an earlier one; data.duplicates = 'drop' leaves them out"
    yield from (f"note      {note}" for note in view.notes)
    yield from label_lines(histogram(view.rows))
    if data.task != "image-classify":
        yield from length_lines(view)
    yield from example_lines(view, colour)


def used(recipe: Recipe) -> dict[str, str]:
    """The keys of [data] that name columns for its task."""
    data = recipe.data
    if data.task == "instruct":
        keys = ["messages"] if data.messages else ["prompt", "response"]
    elif data.task == "preference":
        keys = ["prompt", "chosen", "rejected"]
    else:
        keys = {"classify": ["text", "label"], "causal-lm": ["text"]}.get(data.task, ["image", "label"])
    return {key: getattr(data, key) for key in keys}


def label_lines(counts: Mapping[str, int]) -> Iterator[str]:
    if not counts:
        return
    most, wide = max(counts.values()), max(len(plain(label, 30)) for label in counts)
    yield f"labels    {len(counts)}, the rarest with {min(counts.values()):,} rows"
    for label, count in sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))[:FEW]:
        yield f"  {plain(label, 30):<{wide}} {count:>7,} {'█' * max(1, round(FEW * count / most))}"
    if len(counts) > FEW:
        yield f"  ... and {len(counts) - FEW} more"


def length_lines(view: DataSeen) -> Iterator[str]:
    data, lengths = view.recipe.data, sorted(view.looked.lengths)
    if not lengths:
        return
    count = len(lengths)
    some = f" (of the first {count:,})" if count < len(view.rows) else ""
    yield (
        f"tokens    of {view.recipe.model.name}: {lengths[0]} to {lengths[-1]}, half at most "
        f"{lengths[count // 2]}, 95 % at most {lengths[min(count - 1, int(0.95 * count))]}{some}"
    )
    if data.task == "causal-lm":
        yield f"          one stream, cut into blocks of data.max_length = {data.max_length}"
    else:
        long = sum(length > data.max_length for length in lengths)
        yield (
            f"cut       {long:,} of {count:,} ({100 * long / count:.1f} %) are longer than data.max_length = "
            f"{data.max_length}"
        )
    if view.looked.context is not None:
        yield f"context   {view.looked.context} tokens at most"
    for key, rows in view.looked.unshown.items():
        yield f"note      {rows} rows have messages with '{key}', which the chat template does not show"


def example_lines(view: DataSeen, colour: bool) -> Iterator[str]:
    how = "green" if colour else "«»"
    for number, (row, example) in enumerate(zip(view.rows, view.looked.examples, strict=False), 1):
        if number == 1 and any(loss for example in view.looked.examples for _, loss in example):
            yield f"examples  as the model is given them; {how}: what carries loss"
        elif number == 1:
            yield "examples  as the model is given them"
        said = "".join(marked(text, loss, colour) for text, loss in example) or shortened(row.get("image"))
        yield f"  {number}  {said}" + (f"  -> {plain(str(row['label']))}" if "label" in row else "")


def marked(text: str, loss: bool, colour: bool) -> str:
    """A piece of an example in one line."""
    shown = "".join(plain(part) + sign for part, sign in ended(text))
    if not loss:
        return shown
    return f"\x1b[32m{shown}\x1b[0m" if colour else f"«{shown}»"


def ended(text: str) -> Sequence[tuple[str, str]]:
    """The lines of a text, each with the sign of its end."""
    parts = text.split("\n")
    return [(part, "↵") for part in parts[:-1]] + [(parts[-1], "")]


def shortened(value: Any) -> str:
    return plain(repr(value) if not isinstance(value, str) else value.replace("\n", "↵"), WIDTH)

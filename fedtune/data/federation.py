"""A federation's data: every client's training and held-out rows, and one test set.

The order of events: read, limit, (by = "column") keep the clients, draw the test set, make the clients, hold
out at each.
"""

from __future__ import annotations

import hashlib
import json
import operator
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from fedtune.data.partition import Partition
from fedtune.data.rows import Clean, Rows, Table, clean, why_blank
from fedtune.data.settings import PathSource, Source
from fedtune.errors import FedtuneError
from fedtune.rng import stream

__all__ = ["Federation", "Rows", "Slice", "histogram", "load", "load_slice"]


@dataclass(frozen=True)
class Slice:
    """One client's rows; `test` is what it holds out for itself."""

    id: int
    name: str
    train: Rows
    test: Rows


@dataclass(frozen=True)
class Federation:
    """All clients, numbered from 0 in order.

    test     the global test set: the source's own, or test_share of the rows, or what the clients hold out,
             pooled
    labels   the label set, in the order of the class numbers; () for tasks without labels
    dropped  reason -> rows left out; callers report them
    notes    what was decided, or looks odd, in sentences; callers report them
    """

    clients: tuple[Slice, ...]
    test: Rows
    labels: tuple[str, ...] = ()
    dropped: dict[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over labels, clients and all rows, as hex; of an image that is still a file, its path."""
        total = hashlib.sha256(json.dumps(self.labels).encode())
        for name, rows in [
            ("", self.test),
            *((client.name, part) for client in self.clients for part in (client.train, client.test)),
        ]:
            total.update(json.dumps([name, len(rows)]).encode())
            for row in rows:
                total.update(json.dumps(row, sort_keys=True, default=summary).encode())
        return total.hexdigest()

    def without(self, names: Sequence[str]) -> Federation:
        """The same clients under the same numbers, of which those named have no rows; nor are theirs in a
        test set that was pooled from what clients hold out. Raises C104 for a name that is no client's."""
        known = {client.name for client in self.clients}
        if unknown := [name for name in names if name not in known]:
            raise FedtuneError(
                "C104",
                f"'{unknown[0]}' in sampling.without",
                f"a client, such as {', '.join(sorted(known)[:5])}",
                "correct the name",
            )
        left = tuple(replace(one, train=[], test=[]) if one.name in names else one for one in self.clients)
        pooled = [row for client in self.clients for row in client.test]
        own = len(pooled) == len(self.test) and all(map(operator.is_, pooled, self.test))
        test = [row for client in left for row in client.test] if own else self.test
        return replace(self, clients=left, test=test)


def summary(value: Any) -> str:
    """A value that JSON does not know, by its bytes."""
    return hashlib.sha256(value.tobytes()).hexdigest() if hasattr(value, "tobytes") else str(value)


def load(data: Source, partition: Partition, seed: int) -> Federation:
    """Same settings and seed, same rows in every process. Raises D201 to D206 and D208."""
    column = partition.key_column
    table = data.table()
    rows, dropped = usable(data, table, seed, column)
    if data.duplicates == "drop":
        rows = without_repeats(rows, dropped)
    test = (
        None
        if table.test is None
        else clean(
            data,
            table.test,
            f"the test set of {table.where}",
            table.folder,
            column if partition.by_value else "",
        )
    )
    if test is not None:
        count(dropped, why_blank(data), test.blank)
        if data.duplicates == "drop":
            rows = without_repeats(
                rows, dropped, {key_of(row) for row in test.rows}, "training rows that stand in the test set"
            )
    values = partition.values(sizes(data, rows)) if partition.by_value else []
    if values:
        rows, test = (
            only(rows, values, column, dropped),
            None if test is None else only(test, values, column, dropped),
        )
    held: Rows | None = None if test is None else test.rows
    if held is None and data.test_share:
        kept, out = cut(len(rows.rows), data.test_share, "random", seed, -1)
        held = [rows.rows[i] for i in out]
        rows = Clean([rows.rows[i] for i in kept], [rows.keys[i] for i in kept], 0)
    groups = partition.groups(rows.keys, seed, values)
    clients = tuple(
        sliced(data, seed, number, name, [rows.rows[i] for i in group])
        for number, (name, group) in enumerate(groups)
    )
    for client in clients:
        if len(client.train) < partition.min_rows:
            raise partition.too_few(client.name, len(client.train))
    shared = shared_rows(data)
    clients = tuple(replace(one, train=mixed(data, one.train, shared, seed)) for one in clients)
    if held is None:
        held = [row for client in clients for row in client.test]
    if not held and (table.test is not None or data.client_test_share):
        raise FedtuneError(
            "D202",
            f"no rows in the test set of {table.where}",
            "at least one",
            "correct the data or raise data.test_share",
        )
    notes = [*table.notes, *odd_labels([*rows.rows, *held]), *leaks(clients, held)]
    return Federation(clients, held, label_set(data, [*rows.rows, *held, *shared]), dropped, tuple(notes))


def load_slice(data: Source, seed: int, id: int = 0, name: str = "site") -> tuple[Slice, dict[str, int]]:
    """A real site's own rows, all of one client, and the rows left out. A source's own test set is what the
    site holds out; test_share does not apply.

    Raises what `load` raises, and D206 if the task has labels and the recipe does not list them: sites that
    each sorted their
    own labels would number the classes differently.
    """
    if data.task in ("classify", "image-classify") and not data.labels:
        raise FedtuneError(
            "D206",
            "no data.labels at a site",
            "the same label set at every site",
            "list all labels in data.labels",
        )
    table = data.table()
    rows, dropped = usable(data, table, seed, "")
    if table.test is None:
        mine = sliced(data, seed, id, name, rows.rows)
    else:
        test = clean(data, table.test, f"the test set of {table.where}", table.folder)
        count(dropped, why_blank(data), test.blank)
        mine = Slice(id, name, rows.rows, test.rows)
    if not mine.train:
        raise FedtuneError(
            "D205",
            f"0 training rows at '{name}'",
            "at least one",
            "use more data or lower data.client_test_share",
        )
    return replace(mine, train=mixed(data, mine.train, shared_rows(data), seed)), dropped


def shared_rows(data: Source) -> Rows:
    """The rows of data.shared, where a client mixes some in. Raises D201 to D204, D206."""
    if not isinstance(data, PathSource) or not data.share:
        return []
    table = data.model_copy(update={"path": data.shared}).table()
    rows = clean(data, table.rows, table.where, table.folder).rows
    if not rows:
        raise FedtuneError(
            "D202", f"no usable rows in {table.where}", "at least one", "correct data.shared, or remove it"
        )
    return rows


def mixed(data: Source, own: Rows, shared: Rows, seed: int) -> Rows:
    """A client's rows, and behind them so many shared ones that those are data.share of all; all of them
    before any comes again."""
    if not own or not shared:
        return own
    assert isinstance(data, PathSource)
    again, more = divmod(round(len(own) * data.share / (1 - data.share)), len(shared))
    drawn = sorted(stream("shared rows", seed).permutation(len(shared))[:more].tolist())
    return [*own, *shared * again, *(shared[number] for number in drawn)]


def key_of(row: Mapping[str, Any]) -> str:
    """What two rows have in common if they are the same row."""
    return hashlib.sha256(json.dumps(row, sort_keys=True, default=summary).encode()).hexdigest()


def without_repeats(
    rows: Clean, dropped: dict[str, int], seen: set[str] | None = None, reason: str = "rows that stand twice"
) -> Clean:
    """The first of each row; none of those in `seen`."""
    known, kept = set(seen or ()), list[int]()
    for number, row in enumerate(rows.rows):
        key = key_of(row)
        if key not in known:
            known.add(key)
            kept.append(number)
    count(dropped, reason, len(rows.rows) - len(kept))
    return Clean([rows.rows[i] for i in kept], [rows.keys[i] for i in kept], rows.blank)


def leaks(clients: Sequence[Slice], test: Rows) -> list[str]:
    """Rows of the test set that are trained on as well."""
    trained = {key_of(row) for client in clients for row in client.train}
    twice = sum(key_of(row) in trained for row in test)
    if not twice:
        return []
    return [
        f"{twice} of {len(test)} rows of the test set stand among the training rows too; data.duplicates = "
        "'drop' leaves out what stands twice"
    ]


def odd_labels(rows: Rows) -> list[str]:
    """Labels that differ in case or surrounding blanks only are different classes, and rarely meant so."""
    alike: dict[str, list[str]] = {}
    for label in histogram(rows):
        alike.setdefault(label.strip().casefold(), []).append(label)
    several = [", ".join(map(repr, some)) for some in alike.values() if len(some) > 1]
    return [
        f"the labels {some} are different classes, though they differ in case or blanks only"
        for some in several
    ]


def histogram(rows: Sequence[dict[str, Any]]) -> dict[str, int]:
    """Label -> rows, by label; empty for rows without labels."""
    return dict(sorted(Counter(row["label"] for row in rows if "label" in row).items()))


def usable(data: Source, table: Table, seed: int, column: str) -> tuple[Clean, dict[str, int]]:
    """The rows that may train, at most data.limit of them, and what was left out. Raises D202."""
    rows, dropped = clean(data, table.rows, table.where, table.folder, column), dict(table.dropped)
    count(dropped, why_blank(data), rows.blank)
    if not rows.rows:
        raise FedtuneError(
            "D202",
            f"no usable rows in {table.where}",
            "at least one",
            "correct data.path and the columns named in [data]",
        )
    if 0 < data.limit < len(rows.rows):
        chosen = sorted(stream("limit", seed).permutation(len(rows.rows))[: data.limit].tolist())
        count(dropped, f"more than data.limit = {data.limit}", len(rows.rows) - len(chosen))
        rows = Clean([rows.rows[i] for i in chosen], [rows.keys[i] for i in chosen], 0)
    return rows, dropped


def sizes(data: Source, rows: Clean) -> Counter[str]:
    """How much each value of the column has: characters, where a task learns from text as such, otherwise
    rows."""
    total: Counter[str] = Counter()
    for row, key in zip(rows.rows, rows.keys, strict=True):
        if data.task == "causal-lm":
            total[key] += len(row["text"])
        elif data.task == "instruct":
            total[key] += (
                characters(row["messages"])
                if "messages" in row
                else len(row["prompt"]) + len(row["response"])
            )
        elif data.task == "preference":
            total[key] += sum(characters(row[part]) for part in ("prompt", "chosen", "rejected"))
        else:
            total[key] += 1
    return total


def characters(part: str | Sequence[Mapping[str, Any]]) -> int:
    """Of a text, or of what is said in messages."""
    return len(part) if isinstance(part, str) else sum(len(turn["content"]) for turn in part)


def only(rows: Clean, values: Sequence[str], column: str, dropped: dict[str, int]) -> Clean:
    """Rows of the clients that are kept."""
    kept = [i for i, key in enumerate(rows.keys) if key in set(values)]
    count(dropped, f"other values of '{column}' than the {len(values)} clients", len(rows.rows) - len(kept))
    return Clean([rows.rows[i] for i in kept], [rows.keys[i] for i in kept], 0)


def sliced(data: Source, seed: int, number: int, name: str, rows: Rows) -> Slice:
    kept, out = cut(len(rows), data.client_test_share, data.order, seed, number)
    return Slice(number, name, [rows[i] for i in kept], [rows[i] for i in out])


def cut(rows: int, share: float, order: str, seed: int, number: int) -> tuple[list[int], list[int]]:
    """Row numbers kept and held out, both rising: int((1 - share) * rows) are kept, the first ones or at
    random."""
    keep = int((1 - share) * rows)
    if order == "time":
        return list(range(keep)), list(range(keep, rows))
    shuffled = stream("held out", seed, number).permutation(rows).tolist()
    return sorted(shuffled[:keep]), sorted(shuffled[keep:])


def label_set(data: Source, rows: Rows) -> tuple[str, ...]:
    if data.task not in ("classify", "image-classify"):
        return ()
    labels = data.labels or tuple(histogram(rows))
    if len(set(labels)) < 2 or len(set(labels)) < len(labels):
        raise FedtuneError(
            "D206",
            f"the label set {list(labels)[:8]}",
            "two or more different labels",
            "correct the data or data.labels",
        )
    return labels


def count(dropped: dict[str, int], reason: str, rows: int) -> None:
    if rows:
        dropped[reason] = dropped.get(reason, 0) + rows

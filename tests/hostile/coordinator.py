"""A coordinator that was taken over: it holds the coordinator's key and signs whatever it likes; its words
are put into a site's real worker."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedtune.deploy.worker import Worker
from fedtune.trust import canonical, load
from fedtune.trust.signed import seal
from fedtune.trust.ticket import FORMS, TAG
from tests import small
from tests.deploy.inside import SITES, Inside, inside

STATE = b"a state"


class Taken:
    """The coordinator's half of a federation, against one site with rows of its own."""

    def __init__(self, made: Inside, rows: Path, model: Path) -> None:
        self.made, self.rows, self.model = made, rows, model
        self.identity = load(made.keys)
        self.given = made.server_store.offer(made.run, STATE)

    def worker(self, **more: Any) -> Worker:
        """A site as its operator would start it: with rows and a model's folder of its own."""
        return self.made.worker("site-a", **{"data": str(self.rows), "model": str(self.model), **more})

    def recipe(self, **changes: Any) -> dict[str, Any]:
        """A recipe as it would travel; `changes` are dotted paths with __ for the dot, and need not be
        anything that a recipe could say."""
        known = {
            "data__labels": sorted(small.WORDS),
            "deploy__sites": list(SITES),
            "model__name": "org/model",
            "data__path": "elsewhere.jsonl",
        }
        plain = {
            path: changes.pop(path)
            for path in list(changes)
            if path.split("__")[0] in ("method", "data", "partition", "deploy", "model") and path in known
        }
        tree = small.recipe(self.model, self.rows, **(known | plain)).model_dump(mode="json")
        for path, value in changes.items():
            node = tree
            *parents, last = path.split("__")
            for key in parents:
                node = node[key]
            node[last] = value
        return tree

    def ticket(
        self,
        recipe: Mapping[str, Any] | None = None,
        details: Mapping[str, Any] | None = None,
        whole: str = "",
        **about: Any,
    ) -> bytes:
        """A signed ticket, of any words and numbers; `whole`: in place of all details."""
        told = {
            "recipe": json.dumps(recipe or self.recipe()),
            "number": 0,
            "seed": 1,
            "members": [0],
            "last": 0,
            "first": True,
            "told": {},
        }
        values = {
            "protocol": 1,
            "federation": self.identity.name.federation,
            "run": self.made.run,
            "round": 1,
            "client": "site-a",
            "verb": "train",
            "address": "",
            "base": "b" * 64,
            "given": self.given,
            "given_size": len(STATE),
            "budget": 1 << 20,
            "attempt": 1,
            "details": whole or json.dumps(told | dict(details or {})),
        }
        record = canonical.join(TAG, [(form, (values | about)[name]) for name, form in FORMS.items()])
        return seal(record, self.identity).to_json()

    def asks(self, worker: Worker, *args: Any, **about: Any) -> dict[str, Any]:
        """What the site answers."""
        return worker.answer({"what": "ticket", "ticket": self.ticket(*args, **about).decode()})


@contextmanager
def taken(root: Path, model: Path) -> Iterator[Taken]:
    (root / "rows").mkdir()
    rows = small.write_rows(root / "rows")
    with inside(root, model, rows) as made:
        yield Taken(made, rows, model)

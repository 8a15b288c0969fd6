"""What `fedtune check` says leaves a site is what passes: every word of a real run on real workers, and
nothing beside."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedtune.config import method_of
from fedtune.deploy import transport
from fedtune.deploy.site_privacy import book
from fedtune.exchange.uploads import Uploads
from fedtune.runtime.exposure import beside, exposure
from fedtune.transforms import build
from fedtune.wire.frame import opened
from tests import small
from tests.deploy.inside import FakeGrid, answered, inside

GREETING = {  # key of a report -> how the table calls it
    "device": "device",
    "memory": "free memory",
    "speed": "speed",
    "disk": "disk",
    "rows": "rows",
    "bytes": "bytes of its data",
    "versions": "versions",
    "protocol": "versions",
    "cores": "cores",
    "devices": "how many it has",
}
CHANGES: dict[str, dict[str, Any]] = {
    "fedpeft": {"chain": [{"step": "auto"}]},
    "fedkseed": {
        "method": {"type": "fedkseed", "size": 64, "estimator": "spsa", "steps": 2, "batch": 4, "lr": 1e-3}
    },
}


@pytest.mark.parametrize("name", sorted(CHANGES))
def test_the_table_names_all_that_leaves_a_site(
    name: str, tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport, "PAUSE", 0.02)
    monkeypatch.setattr("fedtune.flower.nodes.LOOK_SECONDS", 0.02)
    uploads: list[tuple[str, Any, bytes]] = []
    take = Uploads.take

    def taken(self: Uploads, upload: Any, pieces: Any) -> Any:
        signed = take(self, upload, pieces)
        uploads.append(
            (upload.envelope.verb, upload.envelope, self.server_store.store.read(upload.envelope.payload))
        )
        return signed

    monkeypatch.setattr(Uploads, "take", taken)
    rows = small.write_rows(tmp_path)
    plain = {
        "deploy__data": "sites",
        "data__labels": sorted(small.WORDS),
        "rounds": 2,
    }  # no deploy.test: sites score, too
    with inside(tmp_path, tiny_bert, rows, **plain, **CHANGES[name]) as made:
        own = {"data": str(rows), "model": str(tiny_bert)}
        workers = {101 + n: made.worker(site, **own) for n, site in enumerate(("site-a", "site-b"))}
        workers[103] = made.worker(
            "site-c", data=str(tmp_path / "none.jsonl"), model=str(tiny_bert)
        )  # a mistake, each time
        flower: list[tuple[str, Any]] = []

        def instead(node: int, message: Any) -> Any:
            reply = answered(workers[node], message)
            flower.append((message.metadata.message_type, reply.content))
            return reply

        made.conduct(FakeGrid(workers, instead))
        written = {(line.round, line.release.mechanism) for line in book(workers[101].home)}
        assert {(1, "none"), (2, "none")} <= written  # every answer is in the site's own ledger
        method = method_of(made.recipe)
        assert workers[101].built
        table = {
            row.verb: row.sees
            for row in exposure(method, build(made.recipe.chain), workers[101].built[1].tunable)
        }
    words = beside(method, build(made.recipe.chain))
    assert words.items() <= table.items()
    # over Flower: greetings and outcomes
    reports = [json.loads(_record(c)) for kind, c in flower if kind == "query.site"]
    assert reports and all(
        set(said) == {"nonce", "name", "report"} and set(said["report"]) <= set(GREETING) for said in reports
    )
    assert all(word in table["greeting"] for word in GREETING.values())
    outcomes = [dict(c["outcome"]) for kind, c in flower if kind == "train.ticket"]
    assert {frozenset(o) for o in outcomes} == {frozenset({"code", "said"}), frozenset({"code", "number"})}
    assert "code and a number" in table["mistakes"] and "what its chain chose" in table["figures"]
    # over the exchange: answers
    verbs = {verb for verb, _, _ in uploads}
    assert verbs - {"score"} <= set(method.verbs) and "score" in verbs
    for verb, _, payload in uploads:
        message, _ = opened(payload)
        figures = {metric.name for metric in message.metrics}
        if verb == "score":
            assert (
                figures <= {"accuracy", "perplexity", "loss"}
                and not message.entries
                and all(word in table["scores"] for word in figures)
            )
        else:
            assert (
                figures <= set(method.facts.metrics)
                and all(figure in table["figures"] for figure in figures)
                and verb in table
            )
        known = {
            "version",
            "run",
            "round",
            "client",
            "verb",
            "base",
            "kind",
            "schema",
            "weight",
            "metrics",
            "scaling",
            "scales",
            "exponent",
            "dtypes",
            "digest",
            "entries",
        }
        assert {field.name for field, _ in message.ListFields()} - known <= {"since"} and "weight" in table[
            "figures"
        ]


def test_under_a_mask_nothing_of_one_site_passes_but_what_the_table_names(
    tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Numbers, weights and figures, of training and of scores, are in the ring; keys and shares are the steps'."""
    monkeypatch.setattr(transport, "PAUSE", 0.02)
    monkeypatch.setattr("fedtune.flower.nodes.LOOK_SECONDS", 0.02)
    uploads: list[tuple[str, bytes]] = []
    take = Uploads.take

    def taken(self: Uploads, upload: Any, pieces: Any) -> Any:
        signed = take(self, upload, pieces)
        uploads.append((upload.envelope.verb, self.server_store.store.read(upload.envelope.payload)))
        return signed

    monkeypatch.setattr(Uploads, "take", taken)
    rows, chain = small.write_rows(tmp_path), [{"step": "mask"}]
    plain = {"deploy__data": "sites", "data__labels": sorted(small.WORDS), "rounds": 1, "chain": chain}
    with inside(tmp_path, tiny_bert, rows, **plain) as made:
        own = {"data": str(rows), "model": str(tiny_bert)}
        workers = {101 + n: made.worker(site, **own) for n, site in enumerate(("site-a", "site-b", "site-c"))}
        made.conduct(FakeGrid(workers))
        method = method_of(made.recipe)
        assert workers[101].built
        rows_of_table = exposure(method, build(made.recipe.chain), workers[101].built[1].tunable)
        result = made.folder.read_json("result.json")
    table = {row.verb: row for row in rows_of_table}
    assert table["train"].sees == "the sum only" and table["train"].through == ("ring", "mask")
    assert "sums over members only" in table["figures"].sees and "all clients' sums" in table["scores"].sees
    assert result["federated"] is not None and not result["per_client"]  # a score of all, and of nobody
    steps = {"", ".keys", ".shares", ".peers", ".opening"}
    assert {verb for verb, _ in uploads} == {verb + step for verb in ("train", "score") for step in steps}
    for verb, payload in uploads:
        message, numbers = opened(payload)
        assert message.weight == 1.0 and not message.metrics
        if verb == "train":  # as many values of a byte as there are, each about as often
            assert len(set(bytes(numbers))) == 256


def _record(content: Any) -> bytes:
    from fedtune.trust import Signed

    return Signed.from_json(bytes(content["site"]["sealed"])).record

"""Runs on a grid of nodes without processes: who fails, is missing, comes late or is doubled."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Error, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fedtune.config import method_of
from fedtune.errors import FedtuneError
from fedtune.events import ClientLeftOut
from fedtune.runtime.cohort import RoundCohort
from fedtune.runtime.folder import create
from fedtune.runtime.local import local_transport
from fedtune.runtime.workspace import link_of, workspace_of
from fedtune.schema import digest
from fedtune.types import Round
from tests import small
from tests.conformance.recipes import METHODS
from tests.e2e.test_flower import MEMORY, client_app, journal, messages, server_app
from tests.marks import mostly_thorough
from tests.runtime.test_groups import grouped


class FakeGrid:
    """Flower's Grid without Flower: nodes are called at once, in this process. `broken` says what a node does
    instead.

    partitions  node id -> its partition-id, or None
    broken      (partition-id, round) -> "error" (the node crashed: Flower's error reply), "silent", "refused"
                (Flower does not take
                the message), or a recipe mistake: "data"
    """

    def __init__(
        self, partitions: dict[int, int | None], broken: dict[tuple[int, int], str] | None = None
    ) -> None:
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = (
            1,
            1,
            1,
        )  # without them Flower makes no message
        self.broken: dict[tuple[int, int], str] = broken or {}
        self.replies: dict[str, Message | None] = {}
        config = {node: {} if part is None else {"partition-id": part} for node, part in partitions.items()}
        self.contexts = {node: Context(1, node, config[node], RecordDict(), {}) for node in partitions}

    def get_node_ids(self) -> list[int]:
        return list(self.contexts)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        return [name for message in messages if (name := self.take(message))]

    def take(self, message: Message) -> str:
        context = self.contexts[message.metadata.dst_node_id]
        name = message.metadata.__dict__["_message_id"] = f"m{len(self.replies)}"
        greeting = message.metadata.message_type == messages.HELLO
        number = 0 if greeting else int(message.content["ask"]["round"])
        match self.broken.get((int(context.node_config.get("partition-id", -1)), number)):
            case None:
                self.replies[name] = (client_app.hello if greeting else client_app.answer)(message, context)
            case "error":
                self.replies[name] = Message(Error(5, "Node Unavailable"), reply_to=message)
            case "silent":
                self.replies[name] = None
            case "refused":
                return ""
            case "data":
                message.content["ask"]["recipe"] = str(message.content["ask"]["recipe"]).replace(
                    "rows.jsonl", "gone.jsonl"
                )
                self.replies[name] = client_app.answer(message, context)
        return name

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        ready = [name for name in message_ids if self.replies.get(name)]
        found, self.replies = (
            [self.replies[name] for name in ready],
            {n: None if n in ready else r for n, r in self.replies.items()},
        )
        return found


@pytest.mark.parametrize(
    ("how", "code", "words"),
    [
        pytest.param("error", "F503", "Node Unavailable", marks=pytest.mark.thorough),
        ("silent", "F503", "did not answer within 1 s"),
        pytest.param("refused", "F503", "could not deliver", marks=pytest.mark.thorough),
        ("data", "D201", "gone.jsonl"),
    ],
)
def test_a_node_that_fails_in_a_round_is_left_out_of_it_and_the_run_goes_on(
    how: str, code: str, words: str, tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    recipe = small.recipe(tiny_bert, data, **MEMORY)
    grid = FakeGrid({90 + part: part for part in range(4)}, {(2, 2): how})

    def carry(link: Any, workspace: Any) -> Any:
        return server_app.flower_transport(grid, recipe, server_app.find_nodes(grid, 4, 5), seconds=1)

    folder, result, events = small.play(recipe, tmp_path, carry=carry)
    out = [(e.round, e.client, e.code) for e in events if isinstance(e, ClientLeftOut)]
    assert out == [(2, 2, code)] and words in next(e.text for e in events if isinstance(e, ClientLeftOut))
    assert result["rounds"] == 3 and result["left_out"] == 1
    assert [row[2] for row in journal(folder)[3:]] == ["ok"] * 6 + [code] + [
        "ok"
    ] * 5  # (round, client), ascending


ALIKE = {"memory": MEMORY, "mask": {"chain": [{"step": "mask"}]}} | {
    name: METHODS[name]
    for name in (
        "fedpeft-lora-fa",
        "fedpeft-hft",
        "fedpeft-lift",
        "fedpeft-lift-stages",
        "fedpeft-pissa",
        "fedpeft-eva",
        "fedpeft-corda",
        "fedpeft-4bit",
        "fedkseed-table",
        "offsite-lora",
        "ltsft-union",
    )
}


OFTEN = ["memory", "mask"]


@pytest.mark.parametrize("name", mostly_thorough(ALIKE, OFTEN))
def test_a_run_on_a_grid_without_failures_is_a_local_run(
    name: str, tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    """The fake itself must not be what makes the tests above pass. Secrets of masked sums are where clients' states are."""
    recipe = small.recipe(tiny_bert, data, **ALIKE[name])
    folder = create(tmp_path, "", "run")
    server_app.serve(FakeGrid({7: 3, 5: 1, 6: 2, 9: 0}), recipe, folder, lambda event: None)
    assert journal(folder) == journal(small.play(recipe, tmp_path / "local")[0])


def test_sums_by_group_are_the_same_on_a_grid(tiny_bert: Path, data: Path) -> None:
    recipe = small.recipe(tiny_bert, data)
    workspace = workspace_of(recipe)
    link = grouped(link_of(workspace, method_of(recipe)))
    grid = FakeGrid({90 + part: part for part in range(4)})
    transports = {
        "local": local_transport(link, workspace.client, workspace.done),
        "flower": server_app.flower_transport(grid, recipe, server_app.find_nodes(grid, 4, 5), seconds=60),
    }
    given, sums = link.method.start(workspace.tunable).shared, {}
    for name, transport in transports.items():
        cohort = RoundCohort(
            link, Round(1, recipe.seed, (0, 1, 2, 3)), transport, lambda event: None, workspace.names
        )
        sums[name] = cohort.sum_groups("train", given, lambda client: client // 2)
    assert sums["local"].keys() == sums["flower"].keys() == {0, 1}
    for group, total in sums["local"].items():
        assert (
            digest(total.tensors) == digest(sums["flower"][group].tensors)
            and total.metrics == sums["flower"][group].metrics
        )


@pytest.mark.parametrize(
    ("partitions", "broken", "words"),
    [
        ({5: 0}, {}, r"F502: found no node for client 1 after 1 s \(1 nodes answered\)"),
        ({5: 0, 6: 1}, {(1, 0): "error"}, "F502: found no node for client 1"),
        ({5: 0, 6: 1, 7: 2}, {(2, 0): "silent"}, "F502: found a node that gave no answer within 1 s"),
        ({5: 0, 6: 0}, {}, "F503: two nodes both report that they are client 0"),
        ({5: 0, 6: 1, 7: 1}, {}, "F503: two nodes both report that they are client 1"),
        ({5: 0, 6: None}, {}, "F503: a node does not report which client it is"),
    ],
)
def test_nodes_that_are_missing_or_doubled_are_named_before_the_first_round(
    partitions: Any, broken: Any, words: str
) -> None:
    with pytest.raises(FedtuneError, match=words):
        server_app.find_nodes(FakeGrid(partitions, broken), 2, 1)


def test_a_node_that_comes_late_and_one_that_has_gone_do_not_stop_a_run() -> None:
    grid = FakeGrid({5: 0, 6: 1}, {(1, 0): "error"})
    asked = iter([[5], [5, 6], [5, 6, 8]])
    grid.contexts[8] = Context(1, 8, {"partition-id": 1}, RecordDict(), {})

    def nodes() -> list[int]:
        found = next(asked, [5, 6, 8])
        if 8 in found:
            grid.broken.clear()
        return found

    grid.get_node_ids = nodes  # type: ignore[method-assign]
    assert server_app.find_nodes(grid, 2, 5) == {0: 5, 1: 8}


def test_whoever_waits_for_nodes_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_app, "LATE_SECONDS", 0.2)
    said: list[str] = []
    with pytest.raises(FedtuneError, match=r"F502.*num-supernodes"):
        server_app.find_nodes(FakeGrid({5: 0, 6: 1}), 8, 1, said.append)
    assert (
        len(said) == 1
        and said[0].startswith("waiting for nodes: 2 of 8 clients have one")
        and "num-supernodes" in said[0]
    )
    assert server_app.find_nodes(FakeGrid({5: 0, 6: 1}), 2, 1, said.append) == {0: 5, 1: 6} and len(said) == 1

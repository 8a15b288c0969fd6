"""Members that are slow, busy, lost for a while or gone: a coordinator's run goes on with their answers or without."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from fedtune.deploy import transport
from tests.deploy.conducting import notes, outcomes
from tests.deploy.inside import FakeGrid, answered, inside, lost
from tests.e2e.deploying import MEMORY, local
from tests.marks import mostly_thorough

pytestmark = pytest.mark.usefixtures("quick")


def test_a_member_whose_node_is_lost_and_comes_back_counts_in_the_same_round(
    tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    """Its first ticket of round 2 is lost with node 101; the site comes back as node 900 and is greeted
    there."""
    with inside(tmp_path, tiny_bert, data, **MEMORY) as made:
        tickets = itertools.count(1)

        def instead(node: int, message: Any) -> Any:
            if node == 101 and message.metadata.message_type == "train.ticket" and next(tickets) == 2:
                grid.workers[900] = made.worker(
                    "site-a"
                )  # another life of the same site: nothing but its home is left
                del grid.workers[101]
                return lost(message)
            return ...

        grid = FakeGrid(made.workers(), instead)
        made.conduct(grid)
        assert (900, "query.site") in grid.pushed and (900, "train.ticket") in grid.pushed
        assert (
            made.folder.read_json("result.json")["state_sha256"]
            == local(tmp_path / "local", tiny_bert, data, **MEMORY)[1]["state_sha256"]
        )


@pytest.mark.parametrize("code", mostly_thorough(["", "W604"], ["W604"]))
def test_a_word_about_a_ticket_of_the_round_before_is_not_about_this_one(
    code: str, tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    """site-a's updates are there at once; what Flower says of each ticket (done; or that a second copy of it
    was refused) comes in the next round."""
    with inside(tmp_path, tiny_bert, data, **MEMORY) as made:
        workers, late = made.workers(), dict[str, Any]()

        def instead(node: int, message: Any) -> Any:
            if (node, message.metadata.message_type) != (101, "train.ticket"):
                return ...
            said = answered(workers[node], message)
            said.content["outcome"]["code"] = code
            grid.replies |= late
            late.clear()
            late[f"m{len(grid.pushed) - 1}"] = said
            return None

        grid = FakeGrid(workers, instead)
        made.conduct(grid)
        assert grid.pushed.count((101, "train.ticket")) == 3 and set(outcomes(made.folder).values()) == {"ok"}
        assert (
            made.folder.read_json("result.json")["state_sha256"]
            == local(tmp_path / "local", tiny_bert, data, **MEMORY)[1]["state_sha256"]
        )


def test_a_node_that_is_busy_or_broken_for_a_moment_is_asked_again(
    tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    """Codes that mend themselves: no room at the exchange, a full disk at the site."""
    from flwr.app import ConfigRecord, Message, RecordDict

    with inside(tmp_path, tiny_bert, data, rounds=1, **MEMORY) as made:
        trouble = iter(["E801", "E804", "R404", "F505"])

        def instead(node: int, message: Any) -> Any:
            if (
                node == 102
                and message.metadata.message_type == "train.ticket"
                and (code := next(trouble, ""))
            ):
                return Message(
                    RecordDict(
                        {"outcome": ConfigRecord({"code": code, "found": "x", "expected": "y", "do": "z"})}
                    ),
                    reply_to=message,
                )
            return ...

        grid = FakeGrid(made.workers(), instead)
        made.conduct(grid)
        assert set(outcomes(made.folder).values()) == {"ok"} and grid.pushed.count((102, "train.ticket")) == 5


@pytest.mark.parametrize(
    ("code", "kept"),
    mostly_thorough([("W607", "W607"), ("D201", "D201"), ("Z999", "F503")], [("Z999", "F503")]),
)
def test_what_does_not_mend_itself_leaves_the_member_out_at_once(
    code: str, kept: str, tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    from flwr.app import ConfigRecord, Message, RecordDict

    with inside(tmp_path, tiny_bert, data, rounds=1, **MEMORY) as made:

        def instead(node: int, message: Any) -> Any:
            if node == 102 and message.metadata.message_type == "train.ticket":
                return Message(
                    RecordDict(
                        {"outcome": ConfigRecord({"code": code, "found": "x", "expected": "y", "do": "z"})}
                    ),
                    reply_to=message,
                )
            return ...

        grid = FakeGrid(made.workers(), instead)
        made.conduct(grid)
        assert (
            outcomes(made.folder)[1, 1] == kept
            and grid.pushed.count((102, "train.ticket")) == 1
            and "ask the operator of" in notes(made.folder)[0]
        )


def test_with_over_selection_the_round_ends_with_as_many_as_are_wanted(
    tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    """Three are asked where two are wanted; one never answers, and nobody waits for it."""
    changes = {
        "sampling": {"count": 2},
        "deploy__over": 0.5,
        "deploy__deadline": 600.0,
        "rounds": 1,
        **MEMORY,
    }
    with inside(tmp_path, tiny_bert, data, **changes) as made:
        made.conduct(
            FakeGrid(
                made.workers(),
                lambda node, m: None if node == 101 and m.metadata.message_type == "train.ticket" else ...,
            )
        )
        assert outcomes(made.folder) == {(1, 0): "F503", (1, 1): "ok", (1, 2): "ok"}
        assert "an answer later than 2 others" in notes(made.folder)[0]


def test_after_the_deadline_the_round_goes_on_without_the_member_and_its_update_is_refused(
    tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    with inside(tmp_path, tiny_bert, data, rounds=1, deploy__deadline=3.0, **MEMORY) as made:
        kept: list[bytes] = []

        def instead(node: int, message: Any) -> Any:
            if node == 103 and message.metadata.message_type == "train.ticket":
                kept.append(bytes(message.content["ticket"]["ticket"]))
                return None
            return ...

        grid = FakeGrid(made.workers(), instead)
        made.conduct(grid)
        assert outcomes(made.folder) == {(1, 0): "ok", (1, 1): "ok", (1, 2): "F503"}
        assert "no answer within 3 s (its ticket is out)" in notes(made.folder)[0]
        said = grid.workers[103].answer({"what": "ticket", "ticket": kept[0].decode()})
        assert said["code"] in ("E803", "E806", "W604")  # the run is over: its state and its round are gone


def test_a_ticket_that_flower_has_lost_is_sent_again_after_a_silence(
    tiny_bert: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flower hands a message out once; where the connection broke just then, the node is there and knows of
    nothing."""
    monkeypatch.setattr(transport, "SILENT", 0.5)
    with inside(tmp_path, tiny_bert, data, rounds=1, **MEMORY) as made:
        lost_once = iter([None])
        grid = FakeGrid(
            made.workers(),
            lambda node, m: (
                next(lost_once, ...) if node == 102 and m.metadata.message_type == "train.ticket" else ...
            ),
        )
        made.conduct(grid)
        assert set(outcomes(made.folder).values()) == {"ok"} and grid.pushed.count((102, "train.ticket")) == 2

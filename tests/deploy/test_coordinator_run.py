"""A run on workers of its own process: bytes, quorum, what each site says no to, and what a restart finds
again."""

from __future__ import annotations

import itertools
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file, save_file

from fedtune.deploy import transport, worker
from fedtune.deploy.worker import WorkspaceBuilt
from fedtune.errors import FedtuneError, Paused
from fedtune.events import Noted
from fedtune.exchange import Limits, serve
from fedtune.runtime.protocol import Reply
from fedtune.trust import load
from tests import small
from tests.deploy.inside import SITES, FakeGrid, answered, inside, lost
from tests.e2e.deploying import MEMORY, lines_of, local
from tests.e2e.test_flower import journal


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.write_rows(tmp_path_factory.mktemp("rows"))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "AGAIN", 0.3)
    monkeypatch.setattr(transport, "PAUSE", 0.02)
    monkeypatch.setattr("fedtune.flower.nodes.LOOK_SECONDS", 0.02)
    monkeypatch.setattr("fedtune.flower.nodes.GREETING_SECONDS", 1.0)


def outcomes(folder: Any) -> dict[tuple[int, int], str]:
    """(round, client) -> outcome."""
    with closing(sqlite3.connect(folder.journal)) as db:
        return {
            (number, client): outcome
            for number, client, outcome in db.execute("SELECT round, client, outcome FROM answers")
        }


def notes(folder: Any) -> list[str]:
    with closing(sqlite3.connect(folder.journal)) as db:
        return [note for (note,) in db.execute("SELECT note FROM answers WHERE note != ''")]


def test_a_run_on_workers_has_the_bytes_and_the_journal_of_a_local_run(
    tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    with inside(tmp_path, tiny_bert, data, **MEMORY) as made:
        made.conduct(FakeGrid(made.workers()))
        alone, result = local(tmp_path / "local", tiny_bert, data, **MEMORY)
        assert made.folder.read_json("result.json")["state_sha256"] == result["state_sha256"]
        assert journal(made.folder) == journal(alone)
        assert all([type(e) for e in made.told[site]].count(WorkspaceBuilt) == 1 for site in SITES)
        assert not list(made.server_store.store.objects.iterdir())  # all rounds are over: nothing is kept


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


@pytest.mark.parametrize("code", ["", "W604"])
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


def test_below_the_quorum_the_run_pauses_and_resume_takes_what_was_accepted(
    tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    changes = {"deploy__quorum": 1.0, "deploy__deadline": 4.0, **MEMORY}
    with inside(tmp_path, tiny_bert, data, **changes) as made:
        two = {node: worker for node, worker in made.workers().items() if node != 103}
        with pytest.raises(
            Paused,
            match=r"R409: found 2 usable answers in round 1 \(missing: client-2\), expected 3 "
            r"\(deploy.quorum\).*fedtune resume",
        ):
            made.conduct(FakeGrid(two))
        failed = made.folder.read_json("failed.json")
        assert (failed["code"], failed["exit_code"]) == ("R409", 75) and not outcomes(made.folder)
        everybody = FakeGrid(made.workers())
        made.conduct(everybody)
        assert (
            everybody.pushed.count((101, "train.ticket")) == 2
            and everybody.pushed.count((103, "train.ticket")) == 3
        )  # of round 1, only the third was asked
        assert (
            made.folder.read_json("result.json")["state_sha256"]
            == local(tmp_path / "local", tiny_bert, data, **MEMORY)[1]["state_sha256"]
        )
        assert not (made.folder.path / "failed.json").exists()


def test_a_site_whose_policy_forbids_the_method_is_left_out_with_its_own_words(
    tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    (tmp_path / "policy.toml").write_text('methods = ["fedkseed"]\n')
    with inside(tmp_path, tiny_bert, data, rounds=1, **MEMORY) as made:
        workers = made.workers() | {103: made.worker("site-c", policy=str(tmp_path / "policy.toml"))}
        made.conduct(FakeGrid(workers))
        assert outcomes(made.folder) == {(1, 0): "ok", (1, 1): "ok", (1, 2): "F507"}
        assert (
            ": at 'site-c', number " in notes(made.folder)[0]
            and "ask the operator of 'site-c'" in notes(made.folder)[0]
        )
        assert any(
            "found method 'fedpeft', expected one of fedkseed" in e.text
            for e in made.told["site-c"]
            if isinstance(e, Noted)
        )  # its own terminal


def test_a_site_with_another_base_model_trains_nothing(tiny_bert: Path, data: Path, tmp_path: Path) -> None:
    other = shutil.copytree(tiny_bert, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    weights["embeddings.word_embeddings.weight"][0, 0] += 1
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    with inside(tmp_path, tiny_bert, data, rounds=1, **MEMORY) as made:
        made.conduct(FakeGrid(made.workers() | {102: made.worker("site-b", model=str(other))}))
        assert outcomes(made.folder)[1, 1] == "W604" and any(
            "base model" in e.text and "--model" in e.text
            for e in made.told["site-b"]
            if isinstance(e, Noted)
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


@pytest.mark.parametrize(("code", "kept"), [("W607", "W607"), ("D201", "D201"), ("Z999", "F503")])
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


def test_an_answer_that_rots_on_disk_is_asked_for_again(tiny_bert: Path, data: Path, tmp_path: Path) -> None:
    """A byte of site-b's accepted update flips before it is read; the site, which holds a receipt, computes
    it again."""
    with inside(tmp_path, tiny_bert, data, rounds=2, **MEMORY) as made:
        spoilt: list[str] = []

        def instead(node: int, message: Any) -> Any:
            if node == 102 and message.metadata.message_type == "train.ticket" and not spoilt:
                reply = answered(grid.workers[102], message)
                update = next(
                    u for u in made.server_store.accepted(made.run, 1, "train") if u.client == "site-b"
                )
                path = made.server_store.store.path(update.payload)
                path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1]))
                spoilt.append(update.payload)
                return reply
            return ...

        grid = FakeGrid(made.workers(), instead)
        made.conduct(grid)
        assert (made.server_store.store.damaged / spoilt[0]).exists()
        assert (
            made.folder.read_json("result.json")["state_sha256"]
            == local(tmp_path / "local", tiny_bert, data, rounds=2, **MEMORY)[1]["state_sha256"]
        )
        assert grid.pushed.count((102, "train.ticket")) == 3


def test_an_answer_that_rots_while_the_coordinator_is_down_is_asked_for_again(
    tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    """The site holds a receipt for attempt 1, and the coordinator that starts anew knows of no attempt."""
    with inside(tmp_path, tiny_bert, data, rounds=1, **MEMORY) as made:
        workers = made.workers()

        def dies(node: int, message: Any) -> Any:
            if node == 103 and message.metadata.message_type == "train.ticket":
                raise KeyboardInterrupt  # as if the process ended here; the other two updates are accepted
            return ...

        with pytest.raises(KeyboardInterrupt):
            made.conduct(FakeGrid(workers, dies))
        made.server_store.ledger.forget(
            made.run, 1, "train", "site-a"
        )  # what `ServerStore.read` does with a damaged one, just before the crash
        grid = FakeGrid(workers)
        made.conduct(grid)
        assert set(outcomes(made.folder).values()) == {"ok"}
        assert (
            grid.pushed.count((101, "train.ticket")) == 2
        )  # attempt 1 is answered with a receipt for nothing, attempt 2 with an update


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


def test_the_run_is_known_again_by_its_folder_only_with_its_own_recipe(
    tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    from fedtune.deploy.server import begin

    with inside(tmp_path, tiny_bert, data, **MEMORY) as made:
        same = {"partition__clients": 3, "deploy__data": "partition", **MEMORY}
        again = begin(small.recipe(tiny_bert, data, **same), "run", tmp_path / "runs", made.keys, "x:1")
        assert again.read_json("deploy.json")["run"] == made.run
        with pytest.raises(FedtuneError, match=r"R406: found a run .* that was started with another recipe"):
            begin(small.recipe(tiny_bert, data, **same, rounds=9), "run", tmp_path / "runs", made.keys, "x:1")


def test_events_say_who_was_not_let_in(tiny_bert: Path, data: Path, tmp_path: Path) -> None:
    """A worker whose key was revoked greets like everybody else and is told apart by its signature."""
    from fedtune.trust.authority import revoke

    with inside(tmp_path, tiny_bert, data, rounds=1, deploy__deadline=3.0, **MEMORY) as made:
        revoke(made.keys, "site-b")
        made.conduct(FakeGrid(made.workers()))
        assert outcomes(made.folder) == {(1, 0): "ok", (1, 1): "T706", (1, 2): "ok"}
        said = [e["text"] for e in lines_of(made.folder.path / "events.jsonl") if e["event"] == "Noted"]
        assert any(text.startswith("node 102 is not let in. T706") for text in said)


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


def test_an_update_that_was_finished_and_not_sent_is_sent_later_and_not_computed_again(
    tiny_bert: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The exchange goes away between training and upload; the worker gives up, keeps the update, and its next
    life sends it when it has nothing to do."""
    with inside(tmp_path, tiny_bert, data, rounds=1, **MEMORY) as made:
        workers = made.workers()
        workers[102].exchange.patience = 0.5
        respond, computed = worker.respond, []

        def counted(link: Any, client: Any, ask: Any, *more: Any) -> Reply:
            answer = respond(link, client, ask, *more)
            computed.append(client.id)
            if client.id == 1 and len(computed) == computed.index(1) + 1:
                made.server.stop(0)
            return answer

        monkeypatch.setattr(worker, "respond", counted)

        def instead(node: int, message: Any) -> Any:
            if node == 102 and message.metadata.message_type == "train.ticket" and not computed.count(1):
                reply = answered(workers[102], message)
                assert reply.content["outcome"]["code"] == "E801"
                made.server = serve(
                    made.server_store, load(made.keys), made.server.address, Limits(free_bytes=0)
                )
                again = made.worker("site-b")
                again.flush()
                assert "Noted" in [type(e).__name__ for e in made.told["site-b"]]
                return reply
            return ...

        made.conduct(FakeGrid(workers, instead))
        assert set(outcomes(made.folder).values()) == {"ok"} and sorted(computed) == [0, 1, 2]


def test_a_state_that_rots_on_disk_is_laid_out_again(tiny_bert: Path, data: Path, tmp_path: Path) -> None:
    with inside(tmp_path, tiny_bert, data, rounds=1, **MEMORY) as made:
        spoilt: list[Path] = []

        def instead(node: int, message: Any) -> Any:
            if message.metadata.message_type == "train.ticket" and not spoilt:
                spoilt.extend(made.server_store.store.objects.iterdir())
                spoilt[0].write_bytes(b"x" + spoilt[0].read_bytes()[1:])
            return ...

        grid = FakeGrid(made.workers(), instead)
        made.conduct(grid)
        assert (
            set(outcomes(made.folder).values()) == {"ok"}
            and (made.server_store.store.damaged / spoilt[0].name).exists()
        )
        assert (
            made.folder.read_json("result.json")["state_sha256"]
            == local(tmp_path / "local", tiny_bert, data, rounds=1, **MEMORY)[1]["state_sha256"]
        )


def test_one_process_too_many_leaves_the_run_alone(tiny_bert: Path, data: Path, tmp_path: Path) -> None:
    """A slow submission was taken for lost, and now there are two."""
    with inside(tmp_path, tiny_bert, data, rounds=1, **MEMORY) as made:
        with made.folder.locked(), pytest.raises(FedtuneError, match="R407"):
            made.conduct(FakeGrid(made.workers()))
        assert not (made.folder.path / "failed.json").exists()


def test_a_defect_leaves_its_traceback_in_the_runs_folder(
    tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    with inside(tmp_path, tiny_bert, data, rounds=1, **MEMORY) as made:

        def broken(node: int, message: Any) -> Any:
            raise ZeroDivisionError("a defect")

        with pytest.raises(ZeroDivisionError):
            made.conduct(FakeGrid(made.workers(), broken))
        assert (
            "ZeroDivisionError: a defect" in (made.folder.path / "crash.log").read_text()
            and not (made.folder.path / "failed.json").exists()
        )

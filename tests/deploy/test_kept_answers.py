"""What a coordinator and its sites have on disk: used again after a crash, and asked for again where it rots."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedtune.deploy import worker
from fedtune.exchange import Limits, serve
from fedtune.runtime.protocol import Reply
from fedtune.trust import load
from tests.deploy.conducting import outcomes
from tests.deploy.inside import FakeGrid, answered, inside
from tests.e2e.deploying import MEMORY, local

pytestmark = pytest.mark.usefixtures("quick")


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

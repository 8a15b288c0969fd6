"""The worker behind its socket: who may ask it, for how long nobody has, and what a SuperNode that waits for
nothing costs."""

from __future__ import annotations

import json
import os
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedtune.deploy import client
from fedtune.deploy.worker import Worker
from fedtune.deploy.worker_listener import serve
from fedtune.errors import FedtuneError
from fedtune.flower.worker_socket import through
from fedtune.trust import Signed
from tests import small
from tests.deploy.inside import Inside, inside
from tests.waiting import PATIENCE, wait_for


@pytest.fixture(scope="module")
def made(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Inside]:
    root = tmp_path_factory.mktemp("worker")
    with inside(root, tiny_bert, small.write_rows(root)) as it:
        yield it


@pytest.fixture
def worker(made: Inside, tmp_path: Path) -> Worker:
    """Listening; its thread ends with the tests."""
    it = made.worker("site-a")
    threading.Thread(target=serve, args=(it, tmp_path / "socket"), daemon=True).start()
    wait_for((tmp_path / "socket").exists, "the socket")
    return it


def test_only_this_user_may_ask(worker: Worker, tmp_path: Path) -> None:
    assert stat.S_IMODE(os.stat(tmp_path / "socket").st_mode) == 0o600
    signed = Signed.from_json(
        through(str(tmp_path / "socket"), {"what": "site", "nonce": "00" * 16})["sealed"].encode()
    )
    said = json.loads(signed.record)
    assert (said["name"], said["nonce"]) == ("site-a", "00" * 16) and {"disk", "versions"} <= said[
        "report"
    ].keys()
    assert said["report"]["memory"] > 1 << 20 and said["report"]["speed"] > 0.1


def test_a_ticket_that_is_none_is_a_code_and_a_number(worker: Worker, tmp_path: Path) -> None:
    said = through(str(tmp_path / "socket"), {"what": "ticket", "ticket": "no ticket"})
    assert said["code"].startswith(("W6", "T70")) and said.keys() == {"code", "number"}


def test_no_worker_is_a_sentence_after_a_while(tmp_path: Path) -> None:
    with pytest.raises(FedtuneError, match="F505: this site's worker process is not running"):
        through(str(tmp_path / "none"), {"what": "site"}, seconds=0.3)


def test_a_supernode_that_asks_for_nothing_while_nothing_is_done_is_stuck(
    worker: Worker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that trains keeps its SuperNode silent for hours, and that is well."""
    monkeypatch.setattr(client, "STUCK", 0.3)
    now = time.monotonic()
    silent, born, socket = now - 10, now - 20, str(tmp_path / "socket")
    wait_for(lambda: client.stuck(silent, born, socket), "a worker that is idle for long enough")
    assert not client.stuck(now + 10, born, socket)  # it asked just now
    assert not client.stuck(
        silent, now - 5, socket
    )  # it has not asked anything in this life, and may still be starting
    assert client.stuck(silent, silent + 1 - client.STARTING, socket) and client.stuck(
        now - 900, now - 301, socket
    )
    free = threading.Event()
    monkeypatch.setattr(worker, "done", lambda content: str(free.wait(PATIENCE)))
    asking = threading.Thread(target=through, args=(socket, {"what": "ticket", "ticket": "x"}))
    asking.start()
    wait_for(lambda: worker.callers, "the worker to begin")
    time.sleep(0.5)
    assert not client.stuck(silent, born, socket)
    free.set()
    asking.join()
    wait_for(lambda: client.stuck(silent, born, socket), "a worker that is idle again")
    assert not client.stuck(silent, born, str(tmp_path / "none"))  # a worker that is being started

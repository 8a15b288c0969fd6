"""The journal and the run folder: a round counts once it is committed, and nothing damaged is taken for
good."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sqlite3
import time
from pathlib import Path

import numpy as np
import pytest

from fedtune.errors import FedtuneError
from fedtune.runtime import folder as folders
from fedtune.runtime.checkpoints import ClientStates, load_state, prune_states, save_state, sweep
from fedtune.runtime.folder import RunFolder
from fedtune.runtime.journal import AnswerRecord, Journal, chain
from fedtune.types import State
from tests.waiting import PATIENCE

STATE = State({"a": np.float32([1, 2])}, {"momentum/a": np.float64([0.5])})


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return folders.create(tmp_path, "", "demo")


def commit(journal: Journal, number: int, state: str = "s") -> None:
    journal.commit(
        number,
        f"{state}{number}",
        "f",
        0.1,
        {"loss": 1.0},
        [AnswerRecord(0, "ok", 3.0, 10, 20), AnswerRecord(1, "W607", note="NaN")],
    )


def test_rounds_and_answers_come_back_in_order(folder: RunFolder) -> None:
    journal = Journal(folder.journal)
    commit(journal, 1)
    commit(journal, 2)
    journal.close()
    again = Journal(folder.journal)
    assert [r.number for r in again.rounds()] == [1, 2]
    assert again.answers()[1] == (1, AnswerRecord(1, "W607", note="NaN"))
    again.check()


def test_a_round_cannot_be_committed_twice(folder: RunFolder) -> None:
    journal = Journal(folder.journal)
    commit(journal, 1)
    with pytest.raises(FedtuneError):
        commit(journal, 1)
    assert len(journal.answers()) == 2


def test_links_are_the_chained_hash_and_a_changed_row_breaks_them(folder: RunFolder) -> None:
    journal = Journal(folder.journal)
    commit(journal, 1)
    commit(journal, 2)
    assert journal.rounds()[1].link == chain(chain("", 1, "s1"), 2, "s2")
    sqlite3.connect(folder.journal).execute(
        "UPDATE rounds SET state_sha256 = 'x' WHERE number = 1"
    ).connection.commit()
    with pytest.raises(FedtuneError, match=r"R403.*round 1"):
        journal.check()


def test_a_damaged_page_is_a_sentence(folder: RunFolder) -> None:
    journal = Journal(folder.journal)
    for number in range(1, 200):
        commit(journal, number)
    journal.close()
    content = bytearray(folder.journal.read_bytes())
    content[4096:] = b"\x5a" * (len(content) - 4096)
    folder.journal.write_bytes(bytes(content))
    with pytest.raises(FedtuneError, match=r"R40[34]"):
        damaged = Journal(folder.journal)
        damaged.rounds(), damaged.answers(), damaged.facts()


def test_a_phase_is_remembered(folder: RunFolder) -> None:
    journal = Journal(folder.journal)
    assert journal.phase("base") is None
    journal.finish("base", {"value": 0.5})
    assert journal.phase("base") == {"value": 0.5}


def test_a_file_that_is_no_database_is_refused(folder: RunFolder) -> None:
    folder.journal.write_bytes(b"not a database at all, sorry" * 100)
    with pytest.raises(FedtuneError, match=r"R403.*damaged"):
        Journal(folder.journal)


def test_state_comes_back_to_the_bit_and_damage_is_seen(folder: RunFolder) -> None:
    sha = save_state(folder, 1, STATE)
    back, held = load_state(folder, 1, sha)
    assert held is None
    assert back.shared["a"].dtype == np.float32 and back.shared["a"].tolist() == [1, 2]
    assert back.kept["momentum/a"].tolist() == [0.5]
    content = bytearray(folder.state(1).read_bytes())
    content[-1] ^= 1
    folder.state(1).write_bytes(bytes(content))
    with pytest.raises(FedtuneError, match=r"R403.*SHA-256"):
        load_state(folder, 1, sha)
    folder.state(1).write_bytes(b"12")
    with pytest.raises(FedtuneError, match=r"R403"):
        load_state(folder, 1, "")
    with pytest.raises(FedtuneError, match=r"R403"):
        load_state(folder, 2, "")


def test_states_that_no_commit_names_are_removed(folder: RunFolder) -> None:
    for number in (1, 2, 3, 4):
        save_state(folder, number, STATE)
    prune_states(folder, 3)
    assert sorted(p.name for p in (folder.path / "state").iterdir()) == [
        "round-0002.safetensors",
        "round-0003.safetensors",
    ]


def test_memories_follow_the_answers_that_count(folder: RunFolder) -> None:
    states = ClientStates(folder)
    digests = {}
    for number in (1, 2, 3):
        states.held[7] = {number: {"residual": np.float32([number])}}
        states.held[8] = {number: {}}  # an empty state makes no file
        digests[number] = states.save(number, [7, 8])
        if number < 3:
            states.prune(number, {7: digests[number][7], 8: ""})
            assert not states.held  # the file is enough
            assert states.of(7)[number]["residual"].tolist() == [number] and not states.of(8)
    assert list(digests[2]) == [7]
    crashed = ClientStates(folder)  # round 3 was never committed
    crashed.restore({7: (2, digests[2][7]), 8: (2, "")})
    assert crashed.of(7)[2]["residual"].tolist() == [2] and not crashed.of(8)
    assert (
        not folder.client_state(7, 1).exists()
        and not folder.client_state(7, 3).exists()
        and not folder.client_state(8, 1).exists()
    )


@pytest.mark.parametrize("harm", ["lost", "altered"])
def test_a_client_state_that_is_not_the_counted_one_is_refused(harm: str, folder: RunFolder) -> None:
    states = ClientStates(folder)
    states.held[7] = {1: {"residual": np.float32([1])}}
    known = {7: (1, states.save(1, [7])[7])}
    path = folder.client_state(7, 1)
    path.unlink() if harm == "lost" else path.write_bytes(path.read_bytes()[:-1] + b"!")
    with pytest.raises(FedtuneError, match="R403"):
        ClientStates(folder).restore(known)


def test_half_written_files_and_folders_are_swept(folder: RunFolder) -> None:
    (folder.path / ".adapter.part").mkdir()
    (folder.path / ".adapter.part" / "adapter_model.safetensors").write_bytes(b"half")
    (folder.path / "state" / ".round-0005.safetensors.part").write_bytes(b"half")
    sweep(folder)
    assert not list(folder.path.glob("**/*.part"))


def test_a_folder_is_never_taken_twice(tmp_path: Path) -> None:
    first, second = folders.create(tmp_path, "", "demo"), folders.create(tmp_path, "", "demo")
    assert (first.path.name, second.path.name) == ("demo", "demo-2")
    with pytest.raises(FedtuneError, match=r"R401.*resume"):
        folders.create(tmp_path, "demo", "x")


def test_a_folder_that_holds_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FedtuneError, match=r"R402"):
        folders.existing(tmp_path)
    (tmp_path / "config.json").write_text("{nonsense")
    with pytest.raises(FedtuneError, match=r"R402"):
        folders.existing(tmp_path)
    (tmp_path / "config.json").write_text('{"rounds": "many"}')
    with pytest.raises(FedtuneError, match=r"R402"):
        folders.recipe_of(RunFolder(tmp_path))


def hold(path: Path, ready: object) -> None:
    with RunFolder(path).locked():
        ready.set()  # type: ignore[attr-defined]
        time.sleep(60)


def test_one_process_per_run_and_a_killed_one_lets_go(folder: RunFolder) -> None:
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    other = context.Process(target=hold, args=(folder.path, ready))
    other.start()
    assert ready.wait(PATIENCE)
    with pytest.raises(FedtuneError, match=r"R407"), folder.locked():
        pass
    os.kill(other.pid or 0, signal.SIGKILL)
    other.join()
    with folder.locked():
        pass


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_a_sentence_and_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "result.json"
    target.write_text("old")
    (tmp_path / ".result.json.part").symlink_to(
        "/dev/full"
    )  # every write to it fails with ENOSPC, as on a full disk
    with pytest.raises(FedtuneError, match=r"R404.*no space left"):
        RunFolder(tmp_path).write_json("result.json", {"a": 1})
    assert target.read_text() == "old"

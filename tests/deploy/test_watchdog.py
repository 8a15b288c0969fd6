"""What a recipe's model may take of time and memory at a site: signs of life, deaths, and what is not tried again."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import time
from pathlib import Path

import pytest

from fedtune.deploy import watchdog
from fedtune.deploy.watchdog import ATTEMPT, OFTEN, REFUSED, Watchdog, overdue, refuse, weights_at
from fedtune.errors import ClientFailed


def key(what: str) -> str:
    return hashlib.sha256(what.encode()).hexdigest()


def begun(folder: Path, what: str = "a model", seconds: float = 100.0) -> Watchdog:
    """A life that ends in the middle of something."""
    made = Watchdog(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "unlink", lambda self, missing_ok=False: None)
        with made.bounded(what, seconds):
            pass
    return made


def test_what_is_being_done_is_written_down_and_what_is_done_is_not(tmp_path: Path) -> None:
    made = Watchdog(tmp_path)
    with made.bounded("a model", 7.5):
        assert json.loads((tmp_path / ATTEMPT).read_bytes()) == {
            "key": key("a model"),
            "seconds": 7.5,
            "deaths": 0,
        }
    with pytest.raises(KeyError), made.bounded("a model", 7.5):
        raise KeyError
    assert not list(tmp_path.iterdir())


def test_what_ended_a_worker_twice_is_not_tried_a_third_time(tmp_path: Path) -> None:
    begun(tmp_path)
    second = Watchdog(tmp_path)
    assert second.deaths == {key("a model"): 1} and not list(tmp_path.iterdir())
    with second.bounded("another", 1.0):
        assert json.loads((tmp_path / ATTEMPT).read_bytes())["deaths"] == 0
    (tmp_path / ATTEMPT).write_text(json.dumps({"key": key("a model"), "seconds": 1.0, "deaths": 1}))
    third = Watchdog(tmp_path)
    assert third.deaths == {key("a model"): 2}
    with (
        pytest.raises(
            ClientFailed, match="M311: a model was stopped at this site: it ended this site's worker 2 times"
        ),
        third.bounded("a model", 1.0),
    ):
        pytest.fail("it is not tried")
    with third.bounded("another", 1.0):
        pass


def test_what_gets_done_in_between_is_tried_again(tmp_path: Path) -> None:
    for _ in range(3):
        begun(tmp_path)
        made = Watchdog(tmp_path)
        with made.bounded("a model", 1.0):
            assert json.loads((tmp_path / ATTEMPT).read_bytes())["deaths"] == 1
        assert made.deaths == {}
    assert not (tmp_path / REFUSED).exists()


def test_a_sign_of_life_is_given_now_and_then_and_keeps_a_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    made = Watchdog(tmp_path)
    made.alive()  # nothing is being done
    with made.bounded("a model", 100.0):
        stamps = []
        for step in (OFTEN + 0.1, OFTEN / 2, OFTEN):
            os.utime(tmp_path / ATTEMPT, (1.0, 1.0))
            now[0] += step
            made.alive()
            stamps.append((tmp_path / ATTEMPT).stat().st_mtime > 1.0)
        assert stamps == [True, False, True]


def test_who_does_not_get_on_is_overdue_and_not_tried_again(tmp_path: Path) -> None:
    assert overdue(tmp_path) == ""
    begun(tmp_path, seconds=100.0)
    for ago, late in ((95.0, False), (101.0, True)):
        at = time.time() - ago
        os.utime(tmp_path / ATTEMPT, (at, at))
        assert bool(overdue(tmp_path)) == late
    assert not (tmp_path / ATTEMPT).exists() and overdue(tmp_path) == ""
    assert json.loads((tmp_path / REFUSED).read_bytes()) == {key("a model"): "no progress in 101 s"}
    made = Watchdog(tmp_path)
    assert made.deaths == {}  # that it was ended is no death of its own
    with pytest.raises(ClientFailed, match="no progress in 101 s"), made.bounded("a model", 1.0):
        pass
    (tmp_path / ATTEMPT).write_text("{}")
    os.utime(tmp_path / ATTEMPT, (1.0, 1.0))
    assert overdue(tmp_path) == ""  # a file that was cut says nothing
    (tmp_path / ATTEMPT).write_text('{"key": "k"}')
    for ago, late in ((599.0, False), (601.0, True)):
        at = time.time() - ago
        os.utime(tmp_path / ATTEMPT, (at, at))
        assert bool(overdue(tmp_path)) == late


def test_the_newest_refusals_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "KEPT", 5)
    for number in range(7):
        refuse(tmp_path, str(number), "why")
    refuse(tmp_path, "2", "again")
    known = json.loads((tmp_path / REFUSED).read_bytes())
    assert len(known) == 5 and next(iter(known)) == "3" and list(known.items())[-1] == ("2", "again")
    for content in (b"none", b"[1]"):
        (tmp_path / REFUSED).write_bytes(content)
        assert watchdog.read(tmp_path / REFUSED) == {}


def test_memory_is_bounded_for_as_long_as_it_takes(tmp_path: Path) -> None:
    made, before = Watchdog(tmp_path), resource.getrlimit(resource.RLIMIT_DATA)
    with made.bounded("a model", 1.0, 64 << 20):
        soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
        assert abs(soft - (watchdog.data_now() + (64 << 20) + (1 << 30))) < 32 << 20 and hard == before[1]
    assert resource.getrlimit(resource.RLIMIT_DATA) == before
    with made.bounded("a model", 1.0):
        assert resource.getrlimit(resource.RLIMIT_DATA) == before
    too_much = pytest.raises(ClientFailed, match=r"M311: a model .* more than the 64 MiB")
    with too_much, made.bounded("a model", 1.0, 64 << 20):
        raise MemoryError
    assert resource.getrlimit(resource.RLIMIT_DATA) == before and not (tmp_path / ATTEMPT).exists()
    assert watchdog.data_now() > 1 << 20


def test_bytes_of_a_models_files(tmp_path: Path) -> None:
    assert weights_at(tmp_path) == 0 == weights_at(tmp_path / "none")
    for name, size in (("a.safetensors", 10), ("b.safetensors", 5), ("c.json", 99)):
        (tmp_path / name).write_bytes(bytes(size))
    assert weights_at(tmp_path) == 15

"""A site's own training script that lies, floods, hangs or dies: a sentence at the site, and no update. And
what a coordinator can do to it: nothing."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedtune.deploy import own_trainer
from fedtune.deploy.own_trainer import OwnTrainer, peer
from fedtune.deploy.policy import Policy
from fedtune.deploy.site_books import LEDGER
from fedtune.deploy.worker import Worker
from fedtune.errors import FedtuneError, Refused
from fedtune.events import Noted
from fedtune.model.fit import fit
from fedtune.model.settings import TrainSettings
from fedtune.model.tunable import TunableModel
from fedtune.runtime.trainer_wire import MORE, PLACE, TOKEN, Garbled, Wire
from fedtune.runtime.trainer_wire import WORD as LONGEST
from fedtune.types import Round
from fedtune.wire import EVERYONE, decode, encode_state
from tests import small
from tests.hostile.coordinator import Taken, taken
from tests.hostile.scripts import TOLD, WORD, Answer, Tensors, honest, message, says
from tests.hostile.test_policy import ROWS, read, workspace_of
from tests.waiting import PATIENCE

Question = dict[str, Any]


@pytest.fixture(scope="module")
def tunable(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> TunableModel:
    recipe = small.recipe(tiny_bert, small.write_rows(tmp_path_factory.mktemp("rows")))
    found: TunableModel = small.workspace_of(recipe)[0].tunable
    return found


@pytest.fixture(scope="module")
def hostile(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Taken]:
    with taken(tmp_path_factory.mktemp("taken"), tiny_bert) as made:
        yield made


def own(folder: Path, **policy: Any) -> OwnTrainer:
    return OwnTrainer(folder / "trainer", WORD, Policy(**policy))


def asked(trainer: OwnTrainer, tunable: TunableModel) -> FedtuneError:
    """How a round ends that nothing may come of."""
    before = tunable.read()
    with pytest.raises(FedtuneError) as caught:
        trainer.fit(tunable, None, TrainSettings(), 1)  # type: ignore[arg-type]
    assert all(np.array_equal(value, before[name]) for name, value in tunable.read().items())
    return caught.value


def with_one(value: Callable[[np.ndarray], np.ndarray]) -> Answer:
    """An honest answer, but for its first tensor."""

    def answer(question: Question, given: Tensors) -> bytes:
        first = min(given)
        return message({**TOLD, "number": question["number"]}, {**given, first: value(given[first])})

    return answer


def other(question: Question, given: Tensors) -> bytes:
    first, *rest = sorted(given)
    named = {"../../" + first: given[first], **{name: given[name] for name in rest}}
    return message({**TOLD, "number": question["number"]}, named)


def told(**changes: Any) -> Answer:
    return lambda question, given: honest(question, given, **changes)


LIES: dict[str, tuple[Answer, str, str]] = {
    "no JSON": (lambda q, given: b"\x80\x04cos\nsystem\n", "F503", "a line that is no JSON"),
    "JSON without end": (lambda q, given: b"[" * 60_000 + b"\n", "F503", "a line that is no JSON"),
    "a list": (lambda q, given: b"[]\n", "F503", "a record without a size"),
    "no size": (lambda q, given: b"{}\n", "F503", "a record without a size"),
    "a truth for a size": (lambda q, given: b'{"bytes": true}\n', "F503", "a record without a size"),
    "a line without end": (lambda q, given: b" " * (1 << 20), "F503", "a line of more than"),
    "a terabyte": (lambda q, given: message({}, {}, 1 << 40), "F503", "where at most"),
    "less than nothing": (lambda q, given: message({}, {}, -1), "F503", "where at most"),
    "no safetensors": (lambda q, given: message({}, {}, 64) + b"\x80" * 64, "F503", "cannot be read"),
    "another question's": (told(number=0), "F503", "an answer to another question"),
    "two answers": (lambda q, given: honest(q, given) * 2, "F503", "more than one answer"),
    "no loss": (told(loss="0.5"), "F503", "a record without loss"),
    "a long loss": (told(loss=10**400), "F503", "a record without loss"),
    "fewer rows than none": (told(rows=-1), "F503", "a record without loss"),
    "half a step": (told(steps=0.5), "F503", "a record without loss"),
    "no by its own words": (told(refused="a\x1b[2Jb" + "c" * 9000), "F503", r"says no \(a·\[2Jbc"),
    "a loss that is no number": (told(loss=float("nan")), "W607", "not finite"),
    "a number that is none": (with_one(lambda v: v * np.float32("nan")), "W607", "not finite"),
    "an endless number": (with_one(lambda v: v + np.float32("inf")), "W607", "not finite"),
    "another shape": (with_one(lambda v: v.reshape(-1)), "M305", "another name, shape or type"),
    "another type": (with_one(lambda v: v.astype(np.int32)), "M305", "another name, shape or type"),
    "another name": (other, "M305", r"'\.\./\.\./"),
    "nothing": (lambda q, given: message({**TOLD, "number": q["number"]}, {}), "M305", "another name"),
    "few rows": (told(rows=7), "F507", r"7 rows .* at least 8 \(min_rows\)"),
    "one example": (told(steps=1, batch=1), "F507", r"1 examples .* at least 8 \(min_examples\)"),
}


@pytest.mark.parametrize("lie", sorted(LIES))
def test_a_script_that_lies_is_a_sentence(lie: str, tunable: TunableModel, tmp_path: Path) -> None:
    answer, code, words = LIES[lie]
    trainer = own(tmp_path)
    tracemalloc.start()
    with says(tmp_path / "trainer", answer):
        error = asked(trainer, tunable)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert error.code == code and len(str(error)) < 1000
    assert re.search(words, str(error)), str(error)
    sizes = sum(value.nbytes for value in tunable.read().values())
    assert most < 16 * sizes + 8 * (MORE + LONGEST)


@pytest.mark.parametrize(
    ("policy", "words"),
    [({"min_rows": 65}, "64 rows"), ({"min_examples": 65}, "64 examples"), ({"min_steps": 11}, "10 steps"),
     ({"min_batch": 9}, "8 batch")],
)  # fmt: skip
def test_a_policys_least_numbers_are_the_scripts_too(
    policy: dict[str, int], words: str, tunable: TunableModel, tmp_path: Path
) -> None:
    trainer = own(tmp_path, **policy)
    with says(tmp_path / "trainer", honest):
        error = asked(trainer, tunable)
    assert error.code == "F507" and words in str(error) and next(iter(policy)) in str(error)


def test_who_does_not_know_the_token_or_is_somebody_else_is_not_asked(
    tunable: TunableModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flower's programs at the site can reach the socket."""
    monkeypatch.setattr(own_trainer, "STARTING", 0.3)
    monkeypatch.setattr(own_trainer, "GREETING", 0.3)
    for token in ("", WORD[:-1], WORD + "0", WORD.upper()):
        trainer = own(tmp_path)
        with says(tmp_path / "trainer", honest, token) as heard:
            assert "is not there" in str(asked(trainer, tunable)) and not heard
    trainer = own(tmp_path)
    with socket.socket(socket.AF_UNIX) as silent:
        silent.connect(str(tmp_path / "trainer"))
        assert "is not there" in str(asked(trainer, tunable))
    mine, theirs = socket.socketpair()
    assert peer(mine) == (os.getpid(), os.getuid())
    mine.close()
    theirs.close()
    monkeypatch.setattr(own_trainer, "peer", lambda caller: (os.getpid(), os.getuid() + 1))
    trainer = own(tmp_path)
    with says(tmp_path / "trainer", honest) as heard:
        assert "is not there" in str(asked(trainer, tunable)) and not heard
    assert (tmp_path / "trainer").stat().st_mode & 0o777 == 0o600


HANGS = """
import os, socket, sys, time
from fedtune.runtime.trainer_wire import LINE, PLACE, TOKEN, Wire
call = socket.socket(socket.AF_UNIX)
call.connect(os.environ[PLACE])
wire = Wire(call)
wire.send({"token": os.environ[TOKEN]})
print("asked", flush=True)
if sys.argv[1] == "reads":
    wire.receive(LINE, 1 << 24)
time.sleep(600)
"""


@pytest.mark.parametrize("how", ["reads", "does not even read"])
def test_a_script_that_hangs_is_ended(
    how: str, tunable: TunableModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own_trainer, "SHARE", 1 / 60)  # of the policy's one minute
    trainer = own(tmp_path, minutes=1)
    env = {**os.environ, PLACE: str(tmp_path / "trainer"), TOKEN: WORD}
    with subprocess.Popen([sys.executable, "-c", HANGS, how], env=env, stdout=subprocess.PIPE) as process:
        assert process.stdout and process.stdout.readline() == b"asked\n"
        try:
            error = asked(trainer, tunable)
            assert error.code == "F503" and "has not answered" in str(error)
            assert process.wait(PATIENCE) == -9
        finally:
            process.kill()


def test_a_byte_now_and_then_is_no_answer() -> None:
    mine, theirs = socket.socketpair()
    over = threading.Event()

    def drip() -> None:
        while not over.wait(0.05):
            theirs.send(b" ")

    thread = threading.Thread(target=drip)
    thread.start()
    began = time.monotonic()
    try:
        with pytest.raises(TimeoutError):
            Wire(mine).receive(LONGEST, 0, 0.5)
        assert time.monotonic() - began < 10
    finally:
        over.set()
        thread.join()
        mine.close()
        theirs.close()


def test_a_script_that_dies_while_it_trains_may_come_again_once(
    tunable: TunableModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own_trainer, "STARTING", 0.3)
    trainer = own(tmp_path)

    def dies(question: Question, given: Tensors) -> bytes:
        raise EOFError

    with says(tmp_path / "trainer", dies) as first, says(tmp_path / "trainer", dies) as second:
        error = asked(trainer, tunable)
    assert error.code == "F503" and "ended while it trained" in str(error)
    assert 1 <= len(first) + len(second) <= 2


def test_what_is_more_than_the_local_loop_is_not_asked_of_a_script(
    tunable: TunableModel, tiny_bert: Path, tmp_path: Path
) -> None:
    """Terms that a method adds to the loss would be left out without a word."""
    recipe = small.recipe(tiny_bert, small.write_rows(tmp_path))
    rows = small.workspace_of(recipe)[0].train(0)
    tunable.trainer = lambda *given: pytest.fail("it was asked")
    try:
        with pytest.raises(Refused, match="F507"):
            fit(tunable, rows, TrainSettings(), 1, around=lambda loss_of: loss_of)
    finally:
        tunable.trainer = None


# --- against a real worker


class Held:
    """A worker of a site with a script, and what would leave it."""

    def __init__(self, hostile: Taken, folder: Path, policy: str = "", **recipe: Any) -> None:
        (folder / "policy.toml").write_text(policy + "\n")
        self.hostile = hostile
        self.worker: Worker = hostile.worker(
            policy=str(folder / "policy.toml"), trainer=str(folder / "mine.py"), trainer_token=WORD
        )
        (self.worker.home / LEDGER).unlink(missing_ok=True)
        self.recipe = hostile.recipe(**recipe)
        self.sent: list[bytes] = []

    @property
    def place(self) -> Path:
        return self.worker.home / "trainer"

    def asks(self, monkeypatch: pytest.MonkeyPatch, **odd: np.ndarray) -> dict[str, Any]:
        """The first round's question; `odd`: tensors of the state in place of the method's."""
        self.worker.workspace(read(self.recipe), *workspace_of(self.worker, self.recipe))
        assert self.worker.built
        _, workspace, self.link = self.worker.built
        tunable, now = workspace.tunable, Round(1, 1, (0,))
        self.task = self.link.tasks["train"]
        self.schema = self.task.given(tunable, 0, now)
        self.start = dict(self.link.method.start(tunable).shared)
        state = encode_state(odd or self.start, self.link.header("train", EVERYONE, now, self.schema))

        class Receipt(Exception):
            pass

        def send(about: Any, payload: bytes) -> Any:
            self.sent.append(payload)
            raise Receipt  # the exchange would go on

        monkeypatch.setattr(self.worker.exchange, "fetch", lambda about: state)
        monkeypatch.setattr(self.worker.exchange, "send", send)
        return self.hostile.asks(self.worker, self.recipe, base=self.link.base, run=self.link.run)

    def moved(self) -> float:
        """How long the difference is that left."""
        answer, now = self.task.answer(self.schema, Round(1, 1, (0,))), Round(1, 1, (0,))
        _, said = decode(self.sent[0], self.link.expect("train", 0, now, answer, self.task.kinds(answer)))
        return float(sum(float(np.sum((v - self.start[n]) ** 2)) for n, v in said.values().items()) ** 0.5)

    def last(self) -> str:
        return [event.text for event in self.hostile.made.told["site-a"] if isinstance(event, Noted)][-1]


def far(question: Question, given: Tensors) -> bytes:
    moved = {name: value + np.float32(1e6) for name, value in given.items()}
    return message({**TOLD, "number": question["number"]}, moved)


def test_what_a_script_returns_is_cut_and_charged_as_any_answer(
    hostile: Taken, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Held(hostile, tmp_path, "max_norm = 0.5")
    with says(held.place, far) as heard:
        held.asks(monkeypatch)
    assert heard and held.moved() == pytest.approx(0.5, rel=1e-3)
    line = json.loads((held.worker.home / LEDGER).read_text().splitlines()[-1])
    assert line["verb"] == "train"


@pytest.mark.parametrize(
    ("policy", "recipe", "code", "words"),
    [("min_rows = 65\nmin_examples = 8", {"data__client_test_share": 0.0}, "F507", "64 rows behind an update"),
     ("", {"method__train__private": ROWS}, "F507", "[method.train.private]"),
     ("sums_only = true", {}, "F507", "without a mask"),
     ("max_epsilon = 1000.0", {}, "F507", "epsilon unbounded")],
)  # fmt: skip
def test_a_policy_holds_for_a_script(
    policy: str,
    recipe: dict[str, Any],
    code: str,
    words: str,
    hostile: Taken,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    held = Held(hostile, tmp_path, policy, **recipe)
    with says(held.place, honest) as heard:
        said = held.asks(monkeypatch)
    assert said["code"] == code and set(said) == {"code", "number"} and words in held.last(), held.last()
    assert not held.sent and bool(heard) == ("behind an update" in words)


def test_a_scripts_own_words_stay_at_the_site(
    hostile: Taken, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Held(hostile, tmp_path)
    with says(held.place, told(refused="Anna Kowalski, row 7")):
        said = held.asks(monkeypatch)
    assert said["code"] == "F503" and "Anna" not in json.dumps(said) and "Anna" in held.last()


def test_a_state_with_other_tensors_does_not_reach_the_script(
    hostile: Taken, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Held(hostile, tmp_path)
    with says(held.place, honest) as heard:
        said = held.asks(monkeypatch, **{"../../mine.py": np.zeros(3, np.float32)})
    assert said["code"].startswith("W60") and not heard and not held.sent


@pytest.mark.parametrize(
    "where", ["trainer", "deploy__trainer", "model__trainer", "method__trainer", "method__train__trainer"]
)
def test_no_recipe_names_a_script(where: str, hostile: Taken, tmp_path: Path) -> None:
    """Neither at a site that has one nor at one that has none."""
    marker = tmp_path / "ran"
    (tmp_path / "evil.py").write_text(f"open({str(marker)!r}, 'w')")
    for worker in (hostile.worker(), Held(hostile, tmp_path).worker):
        said = hostile.asks(worker, hostile.recipe(**{where: str(tmp_path / "evil.py")}))
        assert said["code"] == "W602" and not marker.exists()


def test_a_line_longer_than_allowed_is_not_kept() -> None:
    mine, theirs = socket.socketpair()
    theirs.sendall(b"x" * 70_000 + b"\n")
    with pytest.raises(Garbled):
        Wire(mine).receive(LONGEST, 0, 5.0)
    mine.close()
    theirs.close()

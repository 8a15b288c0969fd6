"""The site's own training script (fedtune client --trainer): it trains in the place of fedtune's local loop,
on the tensors that the worker hands it.

The worker keeps everything else to itself: keys, policy, chain, log, the rows that count and that are scored.
What comes back is checked as a message would be, held to the site's policy, and goes the way of every answer.
"""

from __future__ import annotations

import contextlib
import hmac
import itertools
import math
import os
import signal
import socket
import struct
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedtune.config import Recipe
from fedtune.deploy.policy import Policy
from fedtune.deploy.site_config import SiteConfig
from fedtune.errors import ClientFailed, Refused
from fedtune.model.settings import TrainSettings
from fedtune.plain import plain
from fedtune.rules import tables_of
from fedtune.runtime.trainer_wire import MORE, WORD, Garbled, Wire
from fedtune.types import Tensors

if TYPE_CHECKING:
    from fedtune.model.encode import Encoded
    from fedtune.model.fit import FitReport
    from fedtune.model.tunable import TunableModel

TRAINER = "trainer"  # the socket, beside the worker's own
STARTING = 300.0  # seconds that a script may take to load its model and to call fedtune.patch
GREETING = 5.0  # seconds in which who has called has to say the token
SHARE = 0.9  # of the policy's minutes: after all of them fedtune client ends the worker, not the script
WORDS = 400  # characters of a script's own sentence that are repeated


@dataclass
class Script:
    """A script that has called: its end of the socket, and its process (0 where the system does not say)."""

    wire: Wire
    process: int

    def end(self) -> None:
        """SIGKILL: whoever started it then ends what it has started, and starts it again."""
        if self.process > 1 and self.process != os.getpid():
            with contextlib.suppress(OSError):
                os.kill(self.process, signal.SIGKILL)
        self.wire.close()


@dataclass(frozen=True)
class Trained:
    """What a script says of one round."""

    loss: float
    steps: int
    rows: int
    batch: int

    @classmethod
    def read(cls, record: Mapping[str, Any]) -> Trained:
        """Raises Garbled."""
        loss = record.get("loss")
        counts: list[Any] = [record.get(key) for key in ("steps", "rows", "batch")]
        if not isinstance(loss, float) or not all(type(n) is int and 0 <= n < 1 << 53 for n in counts):
            raise Garbled("a record without loss, steps, rows and batch")
        return cls(loss, *counts)


class OwnTrainer:
    """The worker's end of the socket. One script at a time; one that was started anew takes the place of the
    old one."""

    def __init__(self, place: Path, token: str, policy: Policy) -> None:
        place.unlink(missing_ok=True)
        self.token, self.policy = token, policy
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.listener.bind(str(place))  # in a folder of mode 0700, as the worker's own
        os.chmod(place, 0o600)
        self.listener.listen(8)
        self.script: Script | None = None
        self.numbers = itertools.count(1)

    @classmethod
    def of(cls, config: SiteConfig, policy: Policy) -> OwnTrainer | None:
        place = Path(config.socket).with_name(TRAINER)
        return cls(place, config.trainer_token, policy) if config.trainer else None

    def fit(self, tunable: TunableModel, encoded: Encoded, settings: TrainSettings, seed: int) -> FitReport:
        """In the place of fedtune.model.fit.fit: the trained tensors end as the script leaves them.

        Raises ClientFailed F503 (no script, or one that says no, hangs or says something else), M305 (other
        tensors), W607 (not finite), and F507 where the site's policy does not allow what was trained.
        """
        from fedtune.model.exchanged import probe
        from fedtune.model.fit import FitReport
        from fedtune.model.tunable import read

        began = time.perf_counter()
        named = {**tunable.named, **tunable.still}
        still = sorted(
            name for name, value in named.items() if name in tunable.still or not value.requires_grad
        )
        given = read(named)
        said, values = self.answer({"seed": seed, "still": still, "probe": probe(tunable)}, given)
        require_same(given, values)
        require_finite(said, values)
        self.policy.check_trained(said.rows, said.steps, said.batch)
        tunable.write({name: values[name] for name in tunable.named})
        return FitReport(said.loss, said.steps, said.rows, 0, time.perf_counter() - began)

    def answer(self, question: Mapping[str, Any], given: Tensors) -> tuple[Trained, dict[str, np.ndarray]]:
        """The script's answer. A script that has gone since the last time may come again once; one that says
        something else is hung up on, and one that says nothing in time is ended. Raises ClientFailed F503."""
        most = sum(value.nbytes for value in given.values()) + MORE
        seconds = SHARE * 60.0 * self.policy.minutes
        end = time.monotonic() + seconds
        for patience in (0.0, STARTING):
            script = self.newest(min(patience, end - time.monotonic()))
            if script is None:
                continue
            number = next(self.numbers)
            try:
                script.wire.send({**question, "number": number}, given, end - time.monotonic())
                record, values = script.wire.receive(WORD, most, end - time.monotonic())
                if record.get("number") != number:
                    raise Garbled("an answer to another question")
                if "refused" in record:
                    words = plain(str(record["refused"]), WORDS)
                    do = "correct the script, or start this site without --trainer"
                    raise failed(f"says no ({words})", do)
                return Trained.read(record), values
            except TimeoutError:
                script.end()
                self.script = None
                raise failed(
                    f"has not answered in {seconds / 60:.0f} minutes, and was ended",
                    "look for what it waits for in the site's logs/trainer.log",
                ) from None
            except Garbled as error:
                self.hang_up()
                raise failed(
                    f"answers with something else ({plain(str(error), WORDS)})",
                    "let nobody but fedtune.patch use its socket",
                ) from None
            except (OSError, EOFError):
                self.hang_up()
        raise failed("is not there, or ended while it trained", "look at the site's logs/trainer.log")

    def newest(self, patience: float) -> Script | None:
        """The newest script that has called, waited for; None where nobody does."""
        end = time.monotonic() + (patience if self.script is None else 0.0)
        while time.monotonic() < end + GREETING:  # whatever calls meanwhile
            self.listener.settimeout(0.0 if self.script else max(0.0, end - time.monotonic()))
            try:
                caller, _ = self.listener.accept()
            except (TimeoutError, BlockingIOError):
                return self.script
            if script := self.admitted(caller):
                self.hang_up()
                self.script = script
        return self.script

    def admitted(self, caller: socket.socket) -> Script | None:
        """Who has called, if it is a process of this user's that says the token: Flower's programs can reach
        the socket, too."""
        process, user = peer(caller)
        wire = Wire(caller)
        try:
            if user != os.getuid():
                raise Garbled("another user's process")
            record, _ = wire.receive(WORD, 0, GREETING)
            if not hmac.compare_digest(str(record.get("token", "")).encode(), self.token.encode()):
                raise Garbled("another token")
        except (OSError, EOFError, Garbled):
            wire.close()
            return None
        return Script(wire, process)

    def hang_up(self) -> None:
        if self.script:
            self.script.wire.close()
        self.script = None


def peer(caller: socket.socket) -> tuple[int, int]:
    """Process and user at the other end; (0, own) where the system does not say: the token remains."""
    if not hasattr(socket, "SO_PEERCRED"):
        return 0, os.getuid()
    process, user, _ = struct.unpack("3i", caller.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return process, user


def failed(what: str, do: str) -> ClientFailed:
    return ClientFailed("F503", sentence=f"this site's own training script {what}", do=do)


def require_same(given: Tensors, trained: Tensors) -> None:
    """Raises ClientFailed M305."""
    odd = sorted(given.keys() ^ trained.keys()) or [
        name
        for name, value in given.items()
        if trained[name].shape != value.shape or trained[name].dtype != value.dtype
    ]
    if odd:
        raise ClientFailed(
            "M305",
            f"'{plain(odd[0], 200)}' of this site's own training script with another name, shape or type",
            "the tensors that it was given",
            "look at the script",
        )


def require_finite(said: Trained, values: Tensors) -> None:
    """Raises ClientFailed W607."""
    if not math.isfinite(said.loss) or not all(np.isfinite(value).all() for value in values.values()):
        raise ClientFailed(
            "W607",
            "a loss or tensors of this site's own training script that are not finite",
            "finite numbers",
            "lower the learning rate of the script",
        )


def require_trainable(recipe: Recipe) -> None:
    """Whether a script can stand in for the local loop. Raises Refused F507."""
    tables = [table for table in tables_of(recipe.method) if isinstance(table, TrainSettings)]
    found = ""
    if not recipe.method.own_loop:
        found = f"method.type = '{recipe.method.type}'"
    elif any(table.private.max_grad_norm for table in tables):
        found = "[method.train.private], whose bound on each example's gradient no script promises to keep,"
    elif recipe.aggregate.residual_rank or recipe.method.residual:
        rule = f"aggregate.rule = '{recipe.aggregate.rule}'"
        found = f"{recipe.method.residual or rule}, whose residual beside the adapter no script's model has,"
    if found:
        raise Refused(
            "F507",
            f"{found} at a site whose own script trains (--trainer)",
            "a method whose clients train an adapter by the local loop",
            "start this site without --trainer for such a recipe",
        )

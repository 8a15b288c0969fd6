"""The site's own training script (fedtune client --trainer): it trains in the place of fedtune's local loop,
on the tensors that the worker hands it.

The worker keeps everything else to itself: keys, policy, chain, log, the rows that count and that are scored.
What comes back is checked as a message would be, and goes the way of every answer.
"""

from __future__ import annotations

import math
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from fedtune.config import Recipe
from fedtune.errors import ClientFailed, Refused
from fedtune.runtime.trainer_wire import receive, send
from fedtune.types import Tensors

if TYPE_CHECKING:
    from fedtune.model.encode import Encoded
    from fedtune.model.fit import FitReport
    from fedtune.model.settings import TrainSettings
    from fedtune.model.tunable import TunableModel

TRAINER = "trainer"  # the socket, beside the worker's own
STARTING = 300.0  # seconds that a script may take to load its model and to call fedtune.patch
METHODS = ("fedpeft", "experts")  # whose clients train by the local loop, and by nothing else
MORE = 1 << 20  # bytes of names and shapes beside the tensors


class OwnTrainer:
    """The worker's end of the socket. One script at a time; one that was started anew takes the place of the
    old one."""

    def __init__(self, place: Path) -> None:
        place.unlink(missing_ok=True)
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.listener.bind(str(place))
        os.chmod(place, 0o600)
        self.listener.listen(1)
        self.file: BinaryIO | None = None

    def take(self, recipe: Recipe, tunable: TunableModel) -> None:
        """Let the script train this tunable model, instead of fedtune's local loop. Raises Refused F507."""
        require_trainable(recipe)
        tunable.trainer = self.fit

    def fit(self, tunable: TunableModel, encoded: Encoded, settings: TrainSettings, seed: int) -> FitReport:
        """In the place of fedtune.model.fit.fit: the trained tensors end as the script leaves them. Raises
        ClientFailed F503 (no script, or one that says no), M305 (other tensors), W607 (not finite)."""
        from fedtune.model.exchanged import probe
        from fedtune.model.fit import FitReport
        from fedtune.model.tunable import read

        began = time.perf_counter()
        named = {**tunable.named, **tunable.still}
        still = sorted(
            name for name, value in named.items() if name in tunable.still or not value.requires_grad
        )
        given = read(named)
        asked = {"seed": seed, "still": still, "probe": probe(tunable)}
        record, trained = self.answer(asked, given)
        if "refused" in record:
            raise ClientFailed(
                "F503",
                sentence=f"this site's own training script says no ({record['refused']})",
                do="correct the script, or start this site without --trainer",
            )
        require_same(given, trained)
        loss = float(record["loss"])
        if not math.isfinite(loss) or not all(np.isfinite(value).all() for value in trained.values()):
            raise ClientFailed(
                "W607",
                "a loss or tensors of this site's own training script that are not finite",
                "finite numbers",
                "lower the learning rate of the script",
            )
        tunable.write({name: trained[name] for name in tunable.named})
        seconds = time.perf_counter() - began
        return FitReport(loss, int(record["steps"]), int(record["rows"]), 0, seconds)

    def answer(
        self, asked: Mapping[str, Any], given: Tensors
    ) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """The script's answer; a script that has gone since the last time may come again once."""
        most = sum(value.nbytes for value in given.values()) + MORE
        for patience in (0.0, STARTING):
            file = self.script(patience)
            if file is None:
                continue
            try:
                send(file, asked, given)
                return receive(file, most)
            except (OSError, EOFError, ValueError, KeyError) as error:
                self.file, why = None, f"{type(error).__name__} {error}"
                if not isinstance(error, (OSError, EOFError)):
                    raise ClientFailed(
                        "F503",
                        sentence=f"this site's own training script answers with something else ({why})",
                        do="let nobody but fedtune.patch use its socket",
                    ) from error
        raise ClientFailed(
            "F503",
            sentence="this site's own training script is not there, or ended while it trained",
            do="look at the site's logs/trainer.log",
        )

    def script(self, patience: float) -> BinaryIO | None:
        """The newest script that has called, waited for; None where nobody does."""
        self.listener.settimeout(patience if self.file is None else 0.0)
        try:
            while True:
                caller, _ = self.listener.accept()
                caller.settimeout(None)
                self.file = caller.makefile("rwb")  # type: ignore[assignment]
                self.listener.settimeout(0.0)
        except (TimeoutError, BlockingIOError):
            return self.file


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
            f"'{odd[0][:200]}' of this site's own training script with another name, shape or type",
            "the tensors that it was given",
            "look at the script",
        )


def require_trainable(recipe: Recipe) -> None:
    """Whether a script can stand in for the local loop. Raises Refused F507."""
    found = ""
    if recipe.method.type not in METHODS:
        found = f"method.type = '{recipe.method.type}'"
    elif recipe.method.spends:
        found = "[method.train.private], which no script of a site's own promises to keep"
    if found:
        raise Refused(
            "F507",
            f"{found} at a site whose own script trains (--trainer)",
            "a method whose clients train an adapter by the local loop",
            "start this site without --trainer for such a recipe",
        )

"""Trials that Optuna suggests, each after the scores of those before it.

Nothing is stored: suggestions follow from the seed and the scores, so a sweep that goes on asks again, gets
the same, and reads the scores of the runs that are through.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from fedtune.errors import FedtuneError
from fedtune.extras import require
from fedtune.overrides import value_of
from fedtune.sweeps.plan import Trial, axis


def suggestions(
    samples: Sequence[str], trials: int, seed: int
) -> Iterator[tuple[Trial, Callable[[float], None]]]:
    """Each trial, and whom to tell its worth (higher is better; minus infinity: it failed).
    Raises C103, C107."""
    optuna = require("optuna", "sweep", "a sweep with --trials")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    draws = [drawn(text) for text in samples]
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed))
    for number in range(1, trials + 1):
        asked = study.ask()
        settings = {path: draw(asked) for path, draw in draws}

        def answer(worth: float, asked: Any = asked) -> None:
            if math.isfinite(worth):
                study.tell(asked, worth)
            else:
                study.tell(asked, state=optuna.trial.TrialState.FAIL)

        yield Trial(number, settings), answer


def drawn(text: str) -> tuple[str, Callable[[Any], Any]]:
    """A path and how its value is drawn: low..high (whole numbers where both are), log:low..high, or one of
    value,value. Raises C103."""
    path, _, said = text.partition("=")
    if ".." not in said:
        name, values = axis(text)
        return name, lambda trial: trial.suggest_categorical(name, values)
    low, _, high = said.removeprefix("log:").partition("..")
    ends = [value_of(low), value_of(high)]
    log = said.startswith("log:")
    known = path.strip() and all(isinstance(end, (int, float)) and not isinstance(end, bool) for end in ends)
    if not known or ends[0] >= ends[1] or (log and ends[0] <= 0):
        expected = (
            "path=low..high or path=log:low..high, both above 0, such as method.train.lr=log:1e-4..1e-1"
        )
        raise FedtuneError("C103", f"--sample '{text}'", expected, "write the path and two numbers")
    if all(isinstance(end, int) for end in ends):
        return path.strip(), lambda trial: trial.suggest_int(path.strip(), *ends, log=log)
    return path.strip(), lambda trial: trial.suggest_float(path.strip(), *ends, log=log)

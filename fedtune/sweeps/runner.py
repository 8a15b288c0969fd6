"""The runs of a sweep, one after another or several at once; each is finished, gone on with or begun."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedtune import config
from fedtune.config import Recipe
from fedtune.disk import json_text
from fedtune.errors import FedtuneError
from fedtune.runtime.folder import RunFolder

Job = tuple[str, Path]  # a recipe as canonical JSON with its sinks, and the folder of its run


@dataclass(frozen=True)
class Outcome:
    """What result.json of a run says, or the sentence that ended it."""

    result: dict[str, Any]
    error: str = ""


def one_run(job: Job, workers: int = 0) -> Outcome:
    """Bring a run to its end: begin it, resume it after a crash or for more rounds, or read what it left."""
    text, path = job
    recipe = config.decided(config.parse(json.loads(text)))
    folder = RunFolder(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        if (path / "config.json").exists():
            recipe = gone_on(folder, recipe)
        else:
            folder.begin(recipe)
        from fedtune.runtime.run import run
        from fedtune.sinks import sink_of

        return Outcome(
            json.loads(json_text(run(recipe, folder, sink_of(path, recipe.sinks), workers=workers)))
        )
    except FedtuneError as error:
        return Outcome({}, str(error))


def gone_on(folder: RunFolder, wanted: Recipe) -> Recipe:
    """The recipe that the folder's run goes on with: for more rounds where more are wanted."""
    from fedtune.runtime.extend import extend
    from fedtune.runtime.folder import recipe_of

    known = recipe_of(folder)
    return extend(folder, wanted.rounds) if wanted.rounds > known.rounds else known


class Runner:
    """Runs jobs; `jobs` of them at once, each in a process of its own."""

    def __init__(self, jobs: int) -> None:
        self.jobs = jobs
        self.pool: ProcessPoolExecutor | None = None

    def outcomes(self, work: Sequence[Job]) -> Iterator[tuple[int, Outcome]]:
        """Number and outcome of each job, as they come."""
        if self.pool is None:
            yield from ((number, one_run(job)) for number, job in enumerate(work))
            return
        futures = {self.pool.submit(one_run, job, 1): number for number, job in enumerate(work)}
        for future in as_completed(futures):
            yield futures[future], future.result()


@contextmanager
def runner(jobs: int) -> Iterator[Runner]:
    """One job at a time runs here, where torch is loaded once; more get processes of their own."""
    made = Runner(jobs)
    if jobs == 1:
        yield made
        return
    cores = len(os.sched_getaffinity(0))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // jobs)))
    made.pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"))
    try:
        yield made
    except BaseException:
        made.pool.shutdown(wait=False, cancel_futures=True)
        raise
    made.pool.shutdown()

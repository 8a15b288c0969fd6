"""fedtune from Python: what the command line does, as functions.

>>> import fedtune
>>> recipe = fedtune.recipe(None, rounds=3, method__adapter__rank=4)  # the built-in one, two changes
>>> recipe.rounds, recipe.method.adapter.rank
(3, 4)

    result = fedtune.simulate("my.toml", rounds=3)     # a path, a dict or a Recipe
    for event in fedtune.stream("my.toml"): ...        # the same, event by event
    scores = fedtune.evaluate(result.folder)
    fedtune.export(result.folder, "adapter/")
    model, tokenizer = fedtune.load(result.folder)     # a run, or an exported folder

torch is imported by the functions that need it, not by `import fedtune`.
"""

from __future__ import annotations

import contextlib
import copy
import json
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fedtune import config
from fedtune.config import Recipe
from fedtune.errors import FedtuneError
from fedtune.events import Event
from fedtune.extras import require
from fedtune.overrides import toml

if TYPE_CHECKING:
    from fedtune.runtime.forget import Forgotten
    from fedtune.runtime.merge import Merged
    from fedtune.runtime.site_trainer import Patched

Source = str | Path | Mapping[str, Any] | Recipe | None


@dataclass(frozen=True)
class Result:
    """What a run left: its folder, and what its result.json holds."""

    folder: Path
    values: Mapping[str, Any]

    def __getattr__(self, name: str) -> Any:
        """Entries of result.json as attributes: metric, base, local, federated, centralised, rounds,
        state_sha256, ..."""
        if name.startswith("_") or name not in self.values:
            raise AttributeError(f"a result has no '{name}'; it has {', '.join(sorted(self.values))}")
        return self.values[name]


def recipe(source: Source = None, /, **changes: Any) -> Recipe:
    """A recipe from a TOML file, a dict, another recipe, or (None) the built-in federation. Raises C101 to
    C105.

    changes  keys of the recipe with __ for the dot: rounds=3, method__adapter__rank=4
    """
    if isinstance(source, Recipe) and not changes:
        return source
    overrides = [f"{name.replace('__', '.')}={toml(value)}" for name, value in changes.items()]
    if source is None or isinstance(source, (str, Path)):
        return config.read(None if source is None else str(source), overrides)
    tree = source.model_dump(mode="json", exclude_unset=True) if isinstance(source, Recipe) else source
    return config.parse_with(copy.deepcopy(dict(tree)), overrides, "recipe")


def simulate(
    source: Source = None,
    /,
    *,
    runs: str | Path = "runs",
    engine: Literal["local", "flower"] = "local",
    ray: str = "",
    workers: int = 0,
    on_event: Callable[[Event], None] | None = None,
    stem: str = "",
    began: float | None = None,
    **changes: Any,
) -> Result:
    """A whole federation on this machine, in a new folder under `runs`. Several may run in one process, also
    in threads; those take turns while they train.

    engine    local: on this machine's cores; flower: Flower's simulation engine (Ray), with the same result
    ray       flower: the address of a Ray cluster that is there already (host:port, or auto), over whose
              nodes clients are spread; "": RAY_ADDRESS, or else a Ray of our own on this machine
    workers   processes of the local engine that train clients side by side, with one thread each; 0: one for
              each GPU, or core if `model.threads` is 1 and the model is neither tiny nor large
    on_event  is told everything as it happens (fedtune.events); nothing is printed
    stem      begins the folder's name, where the recipe names none: the recipe's file name
    began     time.time() at which the clock of the run starts; None: now

    Raises FedtuneError with the code and sentence that the command line would print.
    """
    from fedtune.disk import json_text
    from fedtune.runtime.folder import create, discard_if_empty
    from fedtune.sinks import sink_of

    for option, given, wanted in (("workers", workers > 1, "local"), ("ray", bool(ray), "flower")):
        if given and engine != wanted:
            found, expected = f"{option} with engine = '{engine}'", f"engine = '{wanted}'"
            raise FedtuneError("C104", found, expected, f"leave {option} out, or take the other engine")
    if workers > 1:  # each of them computes with one
        changes = {"model__threads": 1, **changes}
    known = config.decided(recipe(source, **changes))
    named = Path(source).stem if isinstance(source, (str, Path)) else "demo" if source is None else "run"
    folder = create(Path(runs).expanduser(), known.name, stem or named)
    tell = sink_of(folder.path, known.sinks, *([on_event] if on_event else []))

    try:
        folder.begin(known)
        if engine == "flower":
            require("flwr", "flower", "the engine 'flower'", "F501")
            from fedtune.flower.cluster import address_of
            from fedtune.flower.simulation import simulation

            values = simulation(known, folder, tell, address_of(ray))
        else:
            from fedtune.runtime.run import run

            values = run(known, folder, tell, began=began, workers=workers)
        return Result(folder.path, json.loads(json_text(values)))
    except FedtuneError:
        discard_if_empty(folder)
        raise


def stream(source: Source = None, /, **options: Any) -> Iterator[Event]:
    """`simulate`, as an iterator over its events; the last one is RunDone. Leaving the loop early ends the
    run, which can be resumed. Raises what `simulate` raises, where the run did."""
    events: queue.Queue[Event | BaseException | None] = queue.Queue(1)
    left = threading.Event()

    def tell(event: Event) -> None:
        if left.is_set():
            raise KeyboardInterrupt
        events.put(event)

    def work() -> None:
        try:
            simulate(source, on_event=tell, **options)
        except BaseException as error:
            events.put(error)
        else:
            events.put(None)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while (event := events.get()) is not None:
            if isinstance(event, BaseException):
                raise event
            yield event
    finally:
        left.set()
        while thread.is_alive():
            with contextlib.suppress(queue.Empty):
                events.get(timeout=0.1)


def live() -> AbstractContextManager[Callable[[Event], None]]:
    """What `fedtune simulate` shows, for `on_event`: live in a notebook's cell or at a terminal, else lines.

    with fedtune.live() as show:
        fedtune.simulate("my.toml", on_event=show)
    """
    from fedtune.sinks.display import display

    return display()


def check(source: Source = None, /, **changes: Any) -> list[str]:
    """What `fedtune check` prints: clients, bytes, memory, who sees what. Raises the first mistake; reads no
    weights."""
    from fedtune.runtime import check as found

    return found.rows(found.check(recipe(source, **changes)))


def evaluate(
    run: str | Path,
    data: str | Path = "",
    round: str = "best",
    what: Sequence[str] = (),
    text: str | Path = "",
    steer: str = "",
    steer_weight: float | None = None,
) -> dict[str, Any]:
    """Scores of a run's best (or last) state: on its test set and every client's held-out rows or, with
    `data`, on the rows of a file. Raises C103, M301, M303, M306, R402, R406.

    what  instead of scores, what tuning did: forgetting, calibration, intruders, clients, knowledge
    text  forgetting: a file of general text, instead of the one that Python carries
    steer         experimental: a big language model, scored with its logits moved as tuning moved the run's;
                  self: the run's own, moved away from experts that its gate leaves out (weight None: 0.5)
    steer_weight  how far; None: found, so that it moves as much as the run's did, and told as "steer"
    """
    from fedtune.runtime.effects import effects
    from fedtune.runtime.finished import evaluate_file, evaluate_run
    from fedtune.runtime.folder import existing

    folder = existing(Path(run).expanduser().resolve())
    if what or text:
        return effects(folder, what, round, text, data, steer)
    if data:
        return evaluate_file(folder, str(Path(data).expanduser().resolve()), round, steer, steer_weight)
    return evaluate_run(folder, round, steer, steer_weight)


def export(
    run: str | Path,
    to: str | Path,
    form: str = "",
    rank: int = 0,
    round: Literal["best", "last"] = "best",
    program: str = "",
    intruders: float | None = None,
) -> float:
    """Write a run's model to a new folder: adapter, merged or seeds; "" is what the run left itself.

    program  instead of a form: peft, merged, gguf, vllm, sentence-transformers: loads the folder as it is
    rank     cuts a LoRA adapter to this rank; returns the share of its norm that this loses, 0 otherwise
    round    best: of the rounds that were scored (evaluate.every), the last where none was; or last
    intruders  of a LoRA adapter: the share of its intruder dimensions that is left, 0 to 1

    Raises C103, C107, M306, R401, R402.
    """
    from fedtune.runtime.finished import export_run
    from fedtune.runtime.folder import existing

    place, target = Path(run).expanduser().resolve(), Path(to).expanduser().resolve()
    return export_run(existing(place), form, target, rank, round, program, intruders)


def sweep(
    source: Source = None,
    /,
    *,
    grid: Mapping[str, Sequence[Any]] | None = None,
    seeds: int = 1,
    jobs: int = 1,
    halve: int = 0,
    trials: int = 0,
    samples: Sequence[str] = (),
    to: str | Path = "sweeps/sweep",
    on_run: Callable[[str], None] | None = None,
    **changes: Any,
) -> list[dict[str, Any]]:
    """Runs of a recipe with other settings and seeds; a row each of settings, mean score and spread, the best
    first. The same call goes on with a sweep that was killed.

    grid     dotted path -> values: {"method.adapter.rank": [4, 8]}; every combination is tried
    seeds    of each, from the recipe's on
    jobs     runs at once, each in a process of its own
    halve    successive halving by this factor; 0: all run to the end
    trials   instead of a grid: so many that Optuna suggests, from `samples` such as
             "method.train.lr=log:1e-4..1e-1"
    on_run   is told each run's result in a sentence

    Raises C103, C104, C107, R406, and what a recipe of it is refused with.
    """
    from fedtune.sweeps.plan import combinations
    from fedtune.sweeps.sweep import Plan, results_to
    from fedtune.sweeps.sweep import sweep as swept

    settings = [] if trials else combinations(grid or {})
    plan = Plan(recipe(source, **changes), settings, tuple(samples), trials, seeds, jobs, halve)
    rows = swept(plan, Path(to).expanduser().resolve(), results_to(on_run))
    return [row.values() for row in rows]


def merge(
    adapters: Sequence[str | Path],
    to: str | Path,
    by: str = "mean",
    *,
    options: Mapping[str, Any] | None = None,
    weights: Sequence[float] = (),
    rank: int = 0,
    base: str = "",
    run: str | Path = "",
) -> Merged:
    """One LoRA adapter of several, written to a new folder.

    by, options  the rule and its options, as in `fedtune merge --by ties --set density=0.2`
    rank         of the result; 0 is the sum of ranks
    base         the base of all, whatever the adapters call it
    run          score base, adapters and result on this run's test set

    Raises C102, C103, M304, M305, M306, R401.
    """
    from fedtune.runtime.folder import existing
    from fedtune.runtime.merge import Asked, merge_adapters

    asked = Asked(
        by, {key: str(value) for key, value in (options or {}).items()}, weights, rank, base, Path.cwd()
    )
    scored = existing(Path(run).expanduser().resolve()) if run else None
    return merge_adapters(
        [Path(one).expanduser().resolve() for one in adapters], asked, Path(to).expanduser().resolve(), scored
    )


def forget(
    run: str | Path,
    clients: Sequence[str],
    to: str | Path = "",
    *,
    keys: str | Path = "",
    on_event: Callable[[Event], None] | None = None,
) -> Forgotten:
    """Replay a run of this machine without some clients, in a new folder: its state is that of a run of the
    same recipe with `sampling.without`. The old run stays as it is.

    to    the new run's folder; "" is the old one's name with -without- and the clients
    keys  a member's keys, which sign the certificate

    Raises C103, C104 for a run on real sites, R401, R402, R403, R406, R421.
    """
    from fedtune.runtime.folder import existing
    from fedtune.runtime.forget import beside
    from fedtune.runtime.forget import forget as forgotten

    folder = existing(Path(run).expanduser().resolve())
    target = Path(to).expanduser().resolve() if to else beside(folder, clients)
    signed = Path(keys).expanduser() if keys else None
    return forgotten(folder, clients, target, datetime.now(UTC), signed, [on_event] if on_event else [])


def load(
    folder: str | Path, base: str = "", device: str = "cpu", round: Literal["best", "last"] = "best"
) -> tuple[Any, Any]:
    """The tuned model, in eval mode, and its tokenizer or image processor, from a run's folder or an exported
    adapter.

    base   the base model, where it is not where it was when the adapter was made
    round  of a run's folder: the best round that was scored, as its card says, or the last one

    Raises M304 (no adapter there, or another base), M301.
    """
    from fedtune.runtime.finished import loaded

    tunable = loaded(Path(folder).expanduser(), base, device, round)
    return tunable.net, tunable.base.tokenizer


def patch(
    trainer: Any,
    *,
    rounds: int = 3,
    partition: Mapping[str, Any] | None = None,
    sampling: Mapping[str, Any] | None = None,
    seed: int = 1,
) -> Patched:
    """Let a Hugging Face Trainer's `train` run a federation, simulated in this process, with its own loss,
    collator and callbacks; returns what holds the clients and, afterwards, the history. In a script that a
    real site has started (fedtune client --trainer) it does that site's rounds, and nothing below counts.

    partition  as [partition] in a recipe; a `column` is one of the training rows'. Default: four equal shares
    sampling   as [sampling] in a recipe

    A schedule of the learning rate begins anew at each client and in each round. Raises C101 to D205.
    """
    from fedtune.runtime.site_trainer import patched

    return patched(trainer, rounds=rounds, partition=partition, sampling=sampling, seed=seed)


def predict(
    source: str | Path,
    data: str | Path,
    column: str = "",
    *,
    batch: int = 32,
    tokens: int = 128,
    round: Literal["best", "last"] = "best",
    steer: str = "",
    steer_weight: float | None = None,
) -> Iterator[dict[str, Any]]:
    """What a run's model, or an exported adapter, says of the rows of a file: each row as it was, with
    `prediction` (a label, or a response) and, for labels, `probability` and `probabilities`.

    column  of the texts or prompts, where it is not as in the run's recipe
    tokens  of a response, at most
    steer, steer_weight  as in `evaluate`: the big model answers; rows have `steer_weight`, too

    Raises C103, D201, D203, D204, M301, M303, M304, M306.
    """
    from fedtune.runtime.predict import predicted

    place, rows = Path(source).expanduser().resolve(), str(Path(data).expanduser().resolve())
    return predicted(place, rows, column, batch, tokens, round, steer, steer_weight)

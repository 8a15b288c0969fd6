"""What can be done with a run's committed state: score it again, export it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from fedtune.aggregate import Mean
from fedtune.config import Recipe, method_of, read_method
from fedtune.data import Federation
from fedtune.errors import FedtuneError
from fedtune.events import Event
from fedtune.experts.state import EXPERTS
from fedtune.exports import card, check_target, seeds_card, whole_folder
from fedtune.exports import which as which_round
from fedtune.methods import MethodTable
from fedtune.methods.experts_settings import refuse_merging
from fedtune.methods.seeds import Seeds, read_seeds
from fedtune.model.settings import ModelSettings
from fedtune.runtime import privacy
from fedtune.runtime.baselines import held_out_scores, score_test
from fedtune.runtime.best import best_round, committed_round, round_scores
from fedtune.runtime.checkpoints import ClientStates, load_state
from fedtune.runtime.data_card import data_facts
from fedtune.runtime.folder import RunFolder, recipe_of
from fedtune.runtime.journal import Journal
from fedtune.runtime.paths import located
from fedtune.runtime.rows_at import rows_at
from fedtune.runtime.steered import asked_to_steer, steered_workspace
from fedtune.runtime.workspace import Workspace, build_workspace
from fedtune.types import State

if TYPE_CHECKING:
    from fedtune.model.tunable import TunableModel


def evaluate_run(
    folder: RunFolder, which: str = "best", steer: str = "", weight: float | None = None
) -> dict[str, Any]:
    """Scores of the best (or last) committed state, or of what it steers, on the test set and on each
    client's own held-out rows. Raises R406 where the data has changed since.

    A test set drawn anew from other rows would hold rows that were trained on.
    """
    wish = asked_to_steer(steer, weight)
    workspace, _, number = installed(folder, which, data=True)
    workspace, said = steered_workspace(workspace, wish, lambda: workspace.choosing()[1])
    final = score_test(workspace, "federated", number, nobody)
    return {"round": number, **said, **final, "clients": held_out_scores(workspace, nobody)}


def evaluate_file(
    folder: RunFolder, path: str, which: str = "best", steer: str = "", weight: float | None = None
) -> dict[str, Any]:
    """Scores of the best (or last) committed state, or of what it steers, on all rows of a file or folder, in
    the form of the recipe's [data]; the run's own data is not read."""
    wish = asked_to_steer(steer, weight)
    workspace, _, number = installed(folder, which)
    recipe, labels = workspace.recipe, workspace.federation.labels
    rows, dropped = rows_at(recipe.data, path, labels, recipe.seed, path)
    asked = replace(workspace, federation=replace(workspace.federation, test=rows), _encoded={}, _fronts={})
    asked, said = steered_workspace(asked, wish, asked.test)
    return {
        "round": number,
        "rows": len(rows),
        "left_out": dropped,
        **said,
        **score_test(asked, "federated", number, nobody),
    }


def export_run(
    folder: RunFolder,
    form: str,
    to: Path,
    rank: int = 0,
    which: str = "best",
    program: str = "",
    intruders: float | None = None,
) -> float:
    """Write the best (or last) committed state in a form of its method ("": the first), or as a program reads
    it (fedtune.model.programs); the folder appears whole or not at all. Raises C103, C107, M306, R401.

    `rank` cuts a LoRA adapter, and what it carries beside itself, to the best one of that rank; returns the
    share of its norm that is lost. `intruders` leaves this share of its intruder dimensions.
    """
    target = check_target(to)
    recipe = recipe_of(folder)
    method = method_of(recipe)
    facts, shrink = method.facts, method.capabilities.shrink
    form = form_for(program) if program else form or facts.forms[0]
    if form not in facts.forms:
        found = f"--for {program}, which needs --as {form}," if program else f"--as {form}"
        raise FedtuneError(
            "M306",
            f"{found} for a run of {facts.title}",
            f"--as {' or '.join(facts.forms)}",
            "choose another --as",
        )
    if rank and shrink is None:
        raise FedtuneError("M306", f"--rank for a run of {facts.title}", "a LoRA adapter", "leave --rank out")
    workspace, state, number = installed(folder, which)
    if workspace.tunable.routed is not None:
        refuse_merging(f"{form} --for {program}" if program else form)
    lost = shrink(state, workspace.tunable, rank) if rank and shrink else 0.0
    if intruders is not None:
        from fedtune.model.intruders import reduce

        reduce(workspace.tunable, intruders)
    if program:
        refuse_for(program, workspace.tunable)
    text = card(
        recipe,
        facts.title,
        workspace.base.fingerprint,
        number,
        scores_of(folder, number),
        program or form,
        reason(folder, number),
        data_facts(folder),
        privacy_of(folder, recipe),
    )
    with whole_folder(target) as temporary:
        if program:
            write_for(program, workspace.tunable, temporary, text)
        else:
            method.export(form, state, workspace.tunable, temporary, text, recipe.seed)
    return lost


def scores_of(folder: RunFolder, number: int) -> dict[str, Any] | None:
    """The run's result, where it is of this round."""
    if not (folder.path / "result.json").exists():
        return None
    result = folder.read_json("result.json")
    return result if result.get("kept_round") == number else None


def form_for(program: str) -> str:
    """The method's form that an export for a program is made of. Raises C103."""
    from fedtune.model.programs import PROGRAMS

    if program not in PROGRAMS:
        raise FedtuneError(
            "C103", f"--for {program}", f"one of {', '.join(PROGRAMS)}", "choose another --for"
        )
    return PROGRAMS[program].form


def refuse_for(program: str, tunable: TunableModel) -> None:
    from fedtune.model.programs import PROGRAMS

    PROGRAMS[program].refuse(tunable)


def write_for(program: str, tunable: TunableModel, folder: Path, text: str) -> None:
    from fedtune.model.programs import PROGRAMS

    PROGRAMS[program].write(tunable, folder, text)


def reason(folder: RunFolder, number: int) -> str:
    """Why a card is of this round of the run."""
    journal = Journal(folder.journal)
    try:
        scores, last = round_scores(journal), journal.rounds()[-1].number
    finally:
        journal.close()
    best = {"round": number, **scores[number]} if best_round(scores) == number else None
    return which_round(number, last, best)


def privacy_of(folder: RunFolder, recipe: Recipe) -> list[str]:
    """What a run gave away so far, in sentences."""
    journal = Journal(folder.journal)
    try:
        return list(privacy.told(recipe, journal)["privacy"])
    finally:
        journal.close()


def export_seeds(file: Path, base: str, form: str, to: Path) -> None:
    """Rebuild the model of a seed file on a base model, to the bit, and write it. Raises M304 where the base
    is another one, R403, M306, R401."""
    from fedtune.model.base import load as load_base

    target = check_target(to)
    seeds = read_seeds(file)
    method = table_of(seeds).build(seeds.rounds, Mean())
    forms = [known for known in method.facts.forms if known != "seeds"]
    if form not in forms:
        raise FedtuneError(
            "M306", f"--as {form} from a seed file", f"one of {', '.join(forms)}", "choose another --as"
        )
    model = ModelSettings.model_validate({"name": base, "dtype": seeds.dtype, "pooling": seeds.pooling})
    loaded = load_base(model, seeds.task, seeds.labels, seeds.seed)
    if not loaded.is_called(seeds.base_fingerprint):
        found, expected = (
            f"base model {loaded.fingerprint[:12]} at '{base}'",
            f"{seeds.base_fingerprint[:12]}, which the seeds were made for",
        )
        raise FedtuneError("M304", found, expected, f"give the model that was called '{seeds.base}'")
    tunable = method.prepare(loaded, seeds.seed)
    state = State(seeds.tensors)
    if method.capabilities.verify:
        method.capabilities.verify(state, tunable)
    method.install(state, tunable)
    text = seeds_card(seeds, method.facts.title)
    with whole_folder(target) as temporary:
        method.export(form, state, tunable, temporary, text, seeds.seed)


def table_of(seeds: Seeds) -> MethodTable:
    """The [method] table in a seed file. Raises R403."""
    try:
        return read_method(seeds.method)
    except (KeyError, ValidationError) as error:
        found = f"settings in a seed file that cannot be read ({type(error).__name__})"
        raise FedtuneError(
            "R403", found, "settings of a method of this version", "export it again"
        ) from error


def installed(folder: RunFolder, which: str = "best", data: bool = False) -> tuple[Workspace, State, int]:
    """The run's workspace with its best (or last) committed state in its tunable model. Raises C103, R402
    where no round was committed, M304 for another base.

    data  read the run's data, and refuse data that has changed (R406); otherwise the labels that the journal
          knows are enough
    """
    recipe = recipe_of(folder)
    journal = Journal(folder.journal)
    try:
        journal.check()
        committed = journal.rounds()
        number = committed_round(journal, which) if committed else 0
        facts = journal.facts()
    finally:
        journal.close()
    if not committed:
        raise FedtuneError(
            "R402",
            f"no committed round in '{folder.path}'",
            "a run with at least one",
            f"go on with: fedtune resume {folder.path}",
        )
    state, _ = load_state(
        folder, number, committed[number - 1].file_sha256
    )  # now: a run that is still going on prunes old ones
    place = folder.origin()
    method = method_of(located(recipe, place))
    known = None if data or "labels" not in facts else Federation((), [], tuple(json.loads(facts["labels"])))
    workspace = build_workspace(
        recipe, method, ClientStates(None), nobody, known, place=place, folder=folder.path
    )
    if data and facts.get("data", workspace.federation.fingerprint) != workspace.federation.fingerprint:
        found = (
            f"data that has changed since the run began ({workspace.federation.fingerprint[:12]} now, "
            f"{facts['data'][:12]} then)"
        )
        raise FedtuneError(
            "R406",
            found,
            "the rows of the run, so that none that was trained on is scored",
            "score a file with: fedtune eval RUN --data FILE",
        )
    if not workspace.base.is_called(facts.get("base")):
        found, expected = (
            f"base model {workspace.base.fingerprint[:12]}",
            f"{facts.get('base', '')[:12]}, which this run was trained on",
        )
        raise FedtuneError("M304", found, expected, "point model.name at the same weights")
    method.install(state, workspace.tunable)
    return workspace, state, number


def loaded(folder: Path, base: str = "", device: str = "cpu", which: str = "best") -> TunableModel:
    """The model of a run's folder or an exported adapter, from the adapter alone. Raises M304, M301."""
    from fedtune.hf.pooling import stated
    from fedtune.model.base import load as load_base
    from fedtune.model.export import load_adapter, sidecar

    place = folder
    if which == "last" and (place / "adapter-last").is_dir():
        place = place / "adapter-last"  # where the best round is the last one, there is only adapter/
    place = place / "adapter" if (place / "adapter").is_dir() else place
    about = sidecar(place)
    name = base or from_origin(str(about["base"]), folder)
    model = {"name": name, "device": device, "pooling": stated(about.get("pooling", "own"))}
    labels = tuple(about["labels"])
    tunable = load_adapter(load_base(ModelSettings.model_validate(model), about["task"], labels, 0), place)
    if (place / EXPERTS).is_dir():  # all experts but the general one, and the gate that mixes them
        from fedtune.experts.trained import load_whole, put_on

        put_on(tunable, load_whole(place / EXPERTS))
    return tunable


def from_origin(base: str, run: Path) -> str:
    """A relative path of a run's recipe is meant from where the run was begun."""
    place = None if Path(base).exists() else RunFolder(run).origin()
    return str(place / base) if place and (place / base).exists() else base


def nobody(event: Event) -> None:
    """A sink for work that is not a run."""

"""What tuning did to a model beside what it was for: what it forgot, how sure it is, what it knows, what is
new in its matrices, and which clients moved the same weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedtune.data import load_slice
from fedtune.data.sources import data_at
from fedtune.data.sources.text import Text
from fedtune.errors import FedtuneError
from fedtune.runtime.finished import installed
from fedtune.runtime.folder import EFFECTS, RunFolder
from fedtune.runtime.journal import Journal
from fedtune.runtime.overlaps import overlaps
from fedtune.types import LM_TASKS

if TYPE_CHECKING:
    from fedtune.model.encode import Encoded
    from fedtune.model.tunable import TunableModel
    from fedtune.runtime.workspace import Workspace

PARAGRAPHS = 200  # of the default text: some 20,000 tokens


@dataclass(frozen=True)
class Asked:
    """The run's model, and what is asked of it. text: a file of general text; "" takes the default."""

    folder: RunFolder
    workspace: Workspace
    text: str

    @property
    def batch(self) -> int:
        return self.workspace.recipe.evaluate.batch

    @property
    def tunable(self) -> TunableModel:
        return self.workspace.tunable


def effects(
    folder: RunFolder,
    what: Sequence[str],
    which: str = "best",
    text: str | Path = "",
    data: str | Path = "",
    steer: str = "",
) -> dict[str, Any]:
    """Each of `what` by its name, of the best (or last) committed state; kept in the run's folder, where the
    report finds it. `text` is of forgetting alone, and nothing here is of `data` or `steer`. Raises C103 for
    a name that is not known, and what finding it raises."""
    if data:
        raise FedtuneError("C103", "--what with --data", "one of them", "score the file by itself")
    if steer:
        raise FedtuneError("C103", "--what with --steer", "one of them", "score the steered model by itself")
    if text and "forgetting" not in what:
        raise FedtuneError("C103", "--text without forgetting", "--what forgetting", "remove --text")
    odd = sorted(set(what) - FOUND.keys())
    if odd or not what:
        raise FedtuneError(
            "C103", f"--what '{','.join(odd)}'", f"some of {', '.join(FOUND)}, with commas between",
            "correct it",
        )  # fmt: skip
    workspace, _, number = installed(folder, which, data="calibration" in what)
    asked = Asked(folder, workspace, str(Path(text).expanduser().resolve()) if text else "")
    refuse(asked, what)
    tuned = {name: FOUND[name](asked) for name in what}
    from fedtune.model.likelihood import base_alone

    with base_alone(workspace.tunable) as base:
        plain = replace(asked, workspace=replace(workspace, tunable=base))
        before = {name: FOUND[name](plain) for name in what if name in BEFORE and comparable(asked, name)}
    found: dict[str, Any] = {
        name: one | ({"base": before[name]} if name in before else {}) for name, one in tuned.items()
    }
    if "forgetting" in found:
        found["forgetting"]["rise"] = tuned["forgetting"]["loss"] - before["forgetting"]["loss"]
    kept = folder.read_json(EFFECTS) if (folder.path / EFFECTS).exists() else {}
    same = kept if kept.get("round") == number else {}
    folder.write_json(EFFECTS, {**same, "round": number, **found})
    return {"round": number, **found}


def refuse(asked: Asked, what: Sequence[str]) -> None:
    """Raises M306 where a model has no loss on text, or gives no answers that are right or wrong."""
    task = asked.workspace.recipe.data.task
    if "forgetting" in what and task not in LM_TASKS:
        raise FedtuneError(
            "M306", f"forgetting of a model of data.task = '{task}', which has no loss on text",
            "a language model", "leave forgetting out of --what",
        )  # fmt: skip
    if "knowledge" in what and task != "instruct":
        raise FedtuneError(
            "M306", f"knowledge of a model of data.task = '{task}', which is asked no questions",
            "data.task = 'instruct'", "leave knowledge out of --what",
        )  # fmt: skip
    if "calibration" in what and task == "preference":
        raise FedtuneError(
            "M306", "calibration on pairs of responses, of which neither is the right answer",
            "rows with labels, or with text to predict", "leave calibration out of --what",
        )  # fmt: skip


def comparable(asked: Asked, name: str) -> bool:
    """Whether the base says something without the adapter: a classifier's fresh head does not."""
    return name in ("forgetting", "knowledge") or not asked.workspace.base.fresh


def forgetting(asked: Asked) -> dict[str, Any]:
    """Loss on text that has nothing to do with the run's own."""
    from fedtune.model.score import score

    got = score(asked.tunable, general(asked), asked.batch)
    return {"text": asked.text or "topics of Python's own help", "tokens": got.count, "loss": got.loss}


def general(asked: Asked) -> Encoded:
    """The text, encoded as a language model reads it."""
    from fedtune.model.encode import encode

    workspace = asked.workspace
    if asked.text:
        mine, _ = load_slice(
            data_at(Text(), asked.text, task="causal-lm", client_test_share=0.0, limit=0),
            workspace.recipe.seed,
            0,
            "general text",
        )
        rows = [*mine.train, *mine.test]
    else:
        rows = help_topics()
    base = replace(workspace.base, task="causal-lm")
    return encode(rows, base, max_length=workspace.recipe.data.max_length)


def help_topics() -> list[dict[str, Any]]:
    """Paragraphs of the language reference that `help()` shows: text that every installation has."""
    from pydoc_data.topics import topics

    paragraphs = [part.strip() for name in sorted(topics) for part in topics[name].split("\n\n")]
    return [{"text": part} for part in paragraphs if len(part) > 80][:PARAGRAPHS]


def calibration(asked: Asked) -> dict[str, Any]:
    """On the run's test set."""
    from fedtune.model import calibration as found

    return found.calibration(asked.tunable, asked.workspace.test(), asked.batch)


def intruders(asked: Asked) -> dict[str, Any]:
    from fedtune.model import intruders as found

    return found.intruders(asked.tunable)


def clients(asked: Asked) -> dict[str, Any]:
    """How far clients moved the same weights, as the rounds noted it."""
    journal = Journal(asked.folder.journal)
    try:
        return overlaps(journal)
    finally:
        journal.close()


def knowledge(asked: Asked) -> dict[str, Any]:
    """Facts that the run taught, and others."""
    from fedtune.runtime import knowledge as found

    return found.knowledge(asked.workspace)


FOUND: dict[str, Callable[[Asked], dict[str, Any]]] = {
    "forgetting": forgetting,
    "calibration": calibration,
    "intruders": intruders,
    "clients": clients,
    "knowledge": knowledge,
}
BEFORE = ("forgetting", "calibration", "knowledge")  # what is asked of the base, too

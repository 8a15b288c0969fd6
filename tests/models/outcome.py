"""What becomes of one family with one task: for every kind and method "works", or the sentence in which it is
refused.

"works" is much: loaded and scored; the adapter attached, trained for two steps that moved it, scored with a
finite number, exported and
loaded again with the same score (by plain peft with the same logits, where it is peft's), and taken off,
after which the base and its
buffers are what they were, bit for bit. Methods that are no adapter run one round of a whole federation.
"""

from __future__ import annotations

import json
import re
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch

from fedtune.errors import FedtuneError
from fedtune.hf.config import AUTO
from fedtune.model.base import Base, load
from fedtune.model.encode import Encoded, encode
from fedtune.model.export import is_stock, load_adapter, save_adapter
from fedtune.model.fit import fit
from fedtune.model.score import score
from fedtune.model.settings import ModelSettings, TrainSettings
from fedtune.model.tunable import TunableModel, attach, detach
from tests import small, tiny
from tests.models.families import FAMILIES
from tests.models.folders import make
from tests.models.record import COLUMNS, FAULT, WORKS
from tests.tables import adapter_of
from tests.tunables import bare

KINDS: dict[str, dict[str, Any]] = {
    "lora": {"kind": "lora", "rank": 2},
    "bias": {"kind": "bias"},
    "adapter": {"kind": "adapter", "reduction": 4},
    "prompt": {"kind": "prompt", "tokens": 3},
    "prompt, deep": {"kind": "prompt", "tokens": 3, "deep": True},
    "prefix": {"kind": "prefix", "tokens": 3},
    "p-tuning": {"kind": "p-tuning", "tokens": 3},
    "ia3": {"kind": "ia3"},
    "layernorm": {"kind": "layernorm"},
    "head": {"kind": "head"},
    "full": {"kind": "full"},
}
METHODS: dict[str, dict[str, Any]] = {
    "fedkseed": {"type": "fedkseed", "size": 32, "estimator": "spsa", "steps": 4, "batch": 4, "lr": 1e-4},
    "sfprompt": {"type": "sfprompt", "prompts": 3, "train": {"lr": 0.01, "steps": 2, "batch": 4}},
}
TRAIN = TrainSettings(lr=0.01, steps=2, batch=3)


class Fault(Exception):
    """Something that fedtune promises is not so."""


def outcomes(name: str, task: str, root: Path, columns: tuple[str, ...] = COLUMNS) -> dict[str, str]:
    """Column -> what came out, for a family of FAMILIES and one of its tasks; `root` is an empty folder."""
    folder = make(FAMILIES[name], root / name)
    made: dict[str, str] = {}
    base: Base | None = None

    def opened() -> None:
        nonlocal base
        base = load(ModelSettings(name=str(folder), device="cpu", threads=1), task, labels_of(task), 1)
        if not np.isfinite(score(bare(base), rows_for(task, base)).loss):
            raise Fault("a score that is not finite")

    refused = said(opened, root)
    for column in columns:
        if refused != WORKS or base is None:
            made[column] = refused
        elif column in KINDS:
            made[column] = said(lambda one=base, column=column: tried(one, column, root), root)  # type: ignore[misc]
        else:
            made[column] = said(lambda column=column: played(folder, task, column, root), root)  # type: ignore[misc]
    return made


def said(act: Callable[[], None], root: Path) -> str:
    """WORKS, a refusal's sentence without this machine's paths, or where a foreign error came from."""
    try:
        act()
    except FedtuneError as error:
        return sorted_sets(str(error).replace(f"{root}/", ""))
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return (
            f"{FAULT}: {type(error).__name__} at {Path(where.filename).name}:{where.lineno}: "
            f"{str(error).splitlines()[0] if str(error) else ''}"
        )[:300]
    return WORKS


def sorted_sets(text: str) -> str:
    """peft prints sets of names, in the order of this process."""
    return re.sub(r"\{([^{}]*)\}", lambda found: "{" + ", ".join(sorted(found[1].split(", "))) + "}", text)


def tried(base: Base, column: str, root: Path) -> None:
    """One kind of adapter, through all that a client and a user do with it."""
    before = {name: value.detach().clone() for name, value in base.net.state_dict().items()}
    examples = rows_for(base.task, base)
    tunable = attach(base, adapter_of(**KINDS[column]), 1)
    try:
        refused_too_late(lambda: used(tunable, examples, root / f"{base.task} {column}"))
    finally:
        detach(base.attached or tunable)
    check_untouched(base, before)


def used(tunable: TunableModel, examples: Encoded, place: Path) -> None:
    """Train, score, export, and load what was exported."""
    start = tunable.read()
    fit(tunable, examples, TRAIN, 2)
    after = tunable.read()
    if all(np.array_equal(after[name], start[name]) for name in after):
        raise Fault("training left every tensor where it was")
    trained = score(tunable, examples)
    if not np.isfinite(trained.loss):
        raise Fault("a score that is not finite")
    save_adapter(tunable, place, tunable.base.name, "a card")
    if is_stock(tunable):
        check_stock(tunable, place, examples)
    if score(load_adapter(tunable.base, place), examples).loss != trained.loss:
        raise Fault("another loss after export")


def refused_too_late(act: Callable[[], None]) -> None:
    """What was attached must go on to the end."""
    try:
        act()
    except FedtuneError as error:
        raise Fault(f"refused after it was attached: {error}") from error


def check_stock(tunable: TunableModel, place: Path, examples: Encoded) -> None:
    """Plain transformers and peft, given the model's folder and the adapter's, say the same."""
    batch = {name: value for name, value in examples.collate([0, 1]).items() if name != "labels"}
    labels = {"num_labels": len(tunable.base.labels)} if tunable.base.labels else {}
    net = peft.PeftModel.from_pretrained(
        AUTO[tunable.base.task].from_pretrained(tunable.base.name, **labels), str(place)
    ).eval()
    with torch.no_grad():
        ours, theirs = tunable.net(**batch).logits, net(**batch).logits
    if ours.shape != theirs.shape or not torch.allclose(ours, theirs, atol=1e-4):
        raise Fault("an adapter with which plain peft says something else")


def check_untouched(base: Base, before: dict[str, torch.Tensor]) -> None:
    """The base's parameters and buffers, to the bit."""
    now = base.net.state_dict()
    odd = sorted(now.keys() ^ before.keys()) or [
        name for name in before if not torch.equal(now[name], before[name])
    ]
    if odd:
        raise Fault(f"the base's '{odd[0]}' is another one after the adapter was taken off")


def played(folder: Path, task: str, column: str, root: Path) -> None:
    """One round of a federation of two clients."""
    changes: dict[str, Any] = {
        "rounds": 1,
        "partition__clients": 2,
        "data__task": task,
        "data__max_length": 16,
        "data__client_test_share": 0,
    }
    if task == "image-classify":
        changes["data__source"] = "images"
    place = root / f"run {column} {task}"
    place.mkdir()
    _, result, _ = small.play(
        small.recipe(folder, data_for(task, root), method=METHODS[column], **changes), place
    )
    if not np.isfinite(result["federated"]):
        raise Fault("a score that is not finite")


# --- rows ---


def labels_of(task: str) -> tuple[str, ...]:
    return ("a", "b") if task in ("classify", "image-classify") else ()


def rows_of(task: str, count: int = 6) -> list[dict[str, Any]]:
    rows = tiny.images(count) if task == "image-classify" else tiny.texts(count)
    if task == "instruct":
        return [{"prompt": "the red fox", "response": row["text"]} for row in rows]
    return rows


def rows_for(task: str, base: Base) -> Encoded:
    return encode(rows_of(task), base, max_length=16)


def data_for(task: str, root: Path) -> Path:
    """The same as a file, or a folder of pictures."""
    if task != "image-classify":
        path = root / f"{task}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows_of(task, 30)))
        return path
    from PIL import Image

    folder = root / "pictures"
    for number, row in enumerate(tiny.images(30)):
        place = folder / str(row["label"])
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.asarray(row["image"])).save(place / f"{number}.png")
    return folder

"""fedtune from Python: what the command line does, as functions.

>>> import fedtune
>>> recipe = fedtune.recipe(None, rounds=3, method__adapter__rank=4)  # the built-in federation, with two changes
>>> recipe.rounds, recipe.method.adapter.rank
(3, 4)

    result = fedtune.simulate("my.toml", rounds=3)     # a path, a dict or a Recipe
    model, tokenizer = fedtune.load(result.folder)     # a run, or an exported folder

torch is imported by the functions that need it, not by `import fedtune`.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedtune import config
from fedtune.config import Recipe
from fedtune.errors import FedtuneError
from fedtune.events import Event

Source = str | Path | Mapping[str, Any] | Recipe | None


@dataclass(frozen=True)
class Result:
    """What a run left: its folder, and what its result.json holds."""

    folder: Path
    values: Mapping[str, Any]

    def __getattr__(self, name: str) -> Any:
        """Entries of result.json as attributes: metric, base, local, federated, centralised, rounds, state_sha256, ..."""
        if name.startswith("_") or name not in self.values:
            raise AttributeError(f"a result has no '{name}'; it has {', '.join(sorted(self.values))}")
        return self.values[name]


def recipe(source: Source = None, /, **changes: Any) -> Recipe:
    """A recipe from a TOML file, a dict, another recipe, or (None) the built-in federation. Raises C101 to C105.

    changes  keys of the recipe with __ for the dot: rounds=3, method__adapter__rank=4
    """
    overrides = [f"{name.replace('__', '.')}={toml(value)}" for name, value in changes.items()]
    if source is None or isinstance(source, (str, Path)):
        return config.read(None if source is None else str(source), overrides)
    tree = source.model_dump(mode="json", exclude_unset=True) if isinstance(source, Recipe) else copy.deepcopy(dict(source))
    return config.parse_with(tree, overrides, "recipe")


def toml(value: Any) -> str:
    """A Python value as TOML writes it in one line.

    >>> toml({"step": "quantize", "bits": 4})
    '{step = "quantize", bits = 4}'
    """
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key} = {toml(below)}" for key, below in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(toml, value)) + "]"
    return json.dumps(str(value) if isinstance(value, Path) else value)


def simulate(source: Source = None, /, *, runs: str | Path = "runs", on_event: Callable[[Event], None] | None = None, **changes: Any) -> Result:
    """A whole federation in this process, in a new folder under `runs`. Several may run in one process, also in threads; those take turns while they train.

    on_event  is told everything as it happens (fedtune.events); nothing is printed

    Raises FedtuneError with the code and sentence that the command line would print.
    """
    from fedtune.disk import json_text
    from fedtune.runtime.folder import create, discard_if_empty
    from fedtune.runtime.run import run
    from fedtune.sinks.jsonl import jsonl_sink

    known = config.decided(recipe(source, **changes))
    stem = Path(source).stem if isinstance(source, (str, Path)) else "demo" if source is None else "run"
    folder = create(Path(runs).expanduser(), known.name, stem)
    write = jsonl_sink(folder.path / "events.jsonl")

    def tell(event: Event) -> None:
        write(event)
        if on_event:
            on_event(event)

    try:
        folder.begin(known)
        return Result(folder.path, json.loads(json_text(run(known, folder, tell))))
    except FedtuneError:
        discard_if_empty(folder)
        raise


def check(source: Source = None, /, **changes: Any) -> list[str]:
    """What `fedtune check` prints: clients, bytes, memory, who sees what. Raises the first mistake; reads no weights."""
    from fedtune.runtime.check import check as checked
    from fedtune.runtime.check import rows

    return rows(checked(recipe(source, **changes)))


def load(folder: str | Path, base: str = "", device: str = "cpu") -> tuple[Any, Any]:
    """The tuned model, in eval mode, and its tokenizer or image processor, from a run's folder or an exported adapter.

    base  the base model, where it is not where it was when the adapter was made

    Raises M304 (no adapter there, or another base), M301.
    """
    from fedtune.hf.pooling import stated
    from fedtune.model.base import load as load_base
    from fedtune.model.export import load_adapter, sidecar
    from fedtune.model.settings import ModelSettings

    place = Path(folder).expanduser()
    place = place / "adapter" if (place / "adapter").is_dir() else place
    about = sidecar(place)
    name = base or from_origin(str(about["base"]), Path(folder).expanduser())
    loaded = load_base(
        ModelSettings.model_validate({"name": name, "device": device, "pooling": stated(about.get("pooling", "own"))}), about["task"], tuple(about["labels"]), 0
    )
    bench = load_adapter(loaded, place)
    return bench.net, loaded.tokenizer


def from_origin(base: str, run: Path) -> str:
    """A relative path of a run's recipe is meant from where the run was begun."""
    from fedtune.runtime.folder import RunFolder

    place = None if Path(base).exists() else RunFolder(run).origin()
    return str(place / base) if place and (place / base).exists() else base

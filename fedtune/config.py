"""A recipe: one TOML file describes a federation. What can be decided now is decided now, before any download.

recipe = read("my.toml", ["rounds=3", "method.adapter.rank=4"])
"""

from __future__ import annotations

import difflib
import hashlib
import json
import tomllib
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, Field, ValidationError

from fedtune.aggregate.settings import AggregateSettings
from fedtune.data.settings import DataSettings, PartitionSettings
from fedtune.errors import FedtuneError
from fedtune.methods import DEFAULT_METHOD, MethodSettings, build
from fedtune.model.settings import ModelSettings
from fedtune.rules import SELECTORS, check_rules, used
from fedtune.settings import Settings
from fedtune.transforms import ChainStep
from fedtune.transforms.broadcast import DownlinkSettings
from fedtune.types import Method
from fedtune.wire.settings import LimitSettings


class SamplingSettings(Settings):
    """[sampling]: which clients are asked in a round, drawn with the run's seed."""

    fraction: float = Field(1.0, gt=0, le=1)
    """Share of the clients; at least one is asked."""
    count: int = Field(0, ge=0)
    """Number of clients; 0 means `fraction` decides."""


class EvaluateSettings(Settings):
    """[evaluate]: what is measured, and how often."""

    every: int = Field(0, ge=0)
    """Score the global test set every so many rounds; 0 means after the last one only."""
    batch: int = Field(32, ge=1)
    """Examples per forward pass."""
    clients: bool = False
    """After the last round, also score every client's own held-out rows."""
    base: bool = True
    """Score the model before any training."""
    local: bool = True
    """Compare with clients that train alone, each for the steps of a client that takes part in every round."""
    centralised: bool = True
    """Compare with one training on the pooled data, for the same number of steps (or epochs, where steps = 0)."""


class DeploySettings(Settings):
    """[deploy]: real sites (fedtune server, fedtune client). A simulation does not look at it, and a run's identity does not depend on it."""

    sites: tuple[str, ...] = ()
    """Names of the clients, as in their keys, in the order of their numbers; empty takes all clients of the allow list, sorted."""
    data: Literal["sites", "partition"] = "sites"
    """sites: every site has its own rows (fedtune client --data); partition: every site takes its part of [data], for demos."""
    test: str = ""
    """sites: a file or folder at the coordinator, in the form of [data], to score on; empty: sites score what they hold out themselves."""
    deadline: float = Field(3600.0, gt=0)
    """Seconds that sites have for one question; who is later is left out of the round."""
    quorum: float = Field(0.0, ge=0, le=1)
    """Share of the round's members whose answers must count; with fewer, the run pauses (exit code 75) until `fedtune resume`."""
    over: float = Field(0.0, ge=0, le=1)
    """Ask so many more members (a share) than [sampling] says, and end the round when as many as it says have answered."""


class Recipe(Settings):
    """The whole file."""

    name: str = Field("", pattern=r"^[A-Za-z0-9._-]*$")
    """Folder of the run under runs/; empty takes the recipe's file name and the first free number."""
    seed: int = Field(1, ge=0)
    """Every random draw follows from it."""
    rounds: int = Field(10, ge=1)
    """Rounds of the federation."""
    model: ModelSettings = ModelSettings()
    data: DataSettings = DataSettings()
    partition: PartitionSettings = PartitionSettings()
    method: MethodSettings
    sampling: SamplingSettings = SamplingSettings()
    chain: tuple[ChainStep, ...] = ()
    """Steps between a client's update and the server's sum, in the client's order."""
    downlink: DownlinkSettings = DownlinkSettings()
    aggregate: AggregateSettings = AggregateSettings()
    limits: LimitSettings = LimitSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
    deploy: DeploySettings = DeploySettings()

    def canonical(self) -> str:
        """The resolved recipe as canonical JSON."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the canonical JSON, without the name and [deploy], as hex: the same recipe, the same bytes, wherever it runs."""
        known = self.model_dump(mode="json", exclude={"deploy"}) | {"name": ""}
        return hashlib.sha256(json.dumps(known, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def method_of(recipe: Recipe) -> Method:
    """The method that a recipe describes, for all of its rounds."""
    return build(recipe.method, recipe.rounds, recipe.aggregate)


def read(path: str | None, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file (None: the built-in federation) and apply `path=value` overrides. Raises C101 to C105."""
    if path is None:
        text, stem = files("fedtune").joinpath("demo.toml").read_text(encoding="utf-8"), "demo"
    else:
        stem = Path(path).stem
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise FedtuneError(
                "C105",
                f"no readable recipe at '{path}' ({type(error).__name__})",
                "a TOML file",
                "check the path, or run without one for the built-in federation",
            ) from None
    try:
        tree = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise FedtuneError("C103", f"'{path}' that is not TOML ({error})", "key = value lines and [tables]", "mend that line") from None
    for override in sorted(overrides, key=selects):
        apply_override(tree, override)
    return parse(tree, stem)


def selects(override: str) -> tuple[bool, int]:
    """Sorts selectors before what they select: `method.type` takes the file's keys of another method with it, and must not take other overrides."""
    path = override.partition("=")[0].strip()
    return path not in SELECTORS, path.count(".") if path in SELECTORS else 0


def parse(tree: dict[str, Any], stem: str = "recipe") -> Recipe:
    """A recipe from a parsed tree. Raises C101, C102, C104."""
    tree.setdefault("method", {}).setdefault("type", DEFAULT_METHOD) if isinstance(tree.get("method", {}), dict) else None
    try:
        recipe = Recipe.model_validate_json(json.dumps(tree, default=str))
    except ValidationError as error:
        raise sentence(error) from None
    check_rules(recipe)
    return recipe


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Set one dotted path; the value is read as TOML, and as a bare string where it is none."""
    path, equals, raw = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise FedtuneError("C103", f"--set '{override}'", "path=value such as rounds=3", "write the path, an equals sign and the value")
    try:
        value = tomllib.loads(f"v = {raw}")["v"]
    except tomllib.TOMLDecodeError:
        value = raw
    node: Any = tree
    if ".".join(keys) in SELECTORS:
        drop_unused(tree, keys, value)
    for depth, key in enumerate(keys):
        last = depth == len(keys) - 1
        if isinstance(node, list):
            if not key.isdigit() or int(key) >= len(node):
                raise FedtuneError("C103", f"--set '{override}'", f"a number below {len(node)} after '{'.'.join(keys[:depth])}'", "count the tables from 0")
            node[int(key)] = value if last else node[int(key)]
            node = node[int(key)]
        elif isinstance(node, dict):
            node[key] = value if last else node.get(key, {})
            node = node[key]
        else:
            raise FedtuneError("C103", f"--set '{override}'", f"a table at '{'.'.join(keys[:depth])}'", "shorten the path")


def drop_unused(tree: dict[str, Any], keys: list[str], value: Any) -> None:
    """An override that changes a selector (say, the adapter's kind) takes the file's keys for the old value with it."""
    table: Any = tree
    for key in keys[:-1]:
        table = table.get(key, {}) if isinstance(table, dict) else {}
    if isinstance(table, dict) and (keys[-1] != "type" or table.get("type", DEFAULT_METHOD) != value):
        for key in table.keys() - used(".".join(keys), str(value)):
            del table[key]


def sentence(error: ValidationError) -> FedtuneError:
    """The first mistake of a validation as one sentence."""
    first = min(error.errors(include_url=False), key=lambda e: e["type"] != "extra_forbidden")
    place, owner = resolve(first["loc"])
    if first["type"] == "extra_forbidden":
        key, known = str(first["loc"][-1]), list(owner.model_fields) if owner else []
        near = difflib.get_close_matches(key, known, 1)
        hint = f"write '{near[0]}'" if near else "remove it"
        return FedtuneError("C101", f"unknown key '{place}'", f"one of {', '.join(known)}", hint)
    if first["type"] == "union_tag_invalid":
        place, known = f"{place}.{first['ctx']['discriminator'].strip(chr(39))}", first["ctx"]["expected_tags"]
        return FedtuneError("C102", f'{place} = "{first["ctx"]["tag"]}"', f"one of {known}", f"change {place} in the recipe or with --set")
    value = json.dumps(first.get("input"), default=str)
    words = first["msg"][0].lower() + first["msg"][1:]
    return FedtuneError("C102", f"{place} = {value[:80]}", words.removeprefix("input should be "), f"change {place} in the recipe or with --set")


def resolve(loc: tuple[int | str, ...]) -> tuple[str, type[BaseModel] | None]:
    """A pydantic location as a dotted recipe path, and the settings class that holds its last key."""
    words: list[str] = []
    options: list[type[BaseModel]] = [Recipe]
    holder: type[BaseModel] | None = None
    for part in loc:
        tagged = [c for c in options if part in tags(c)]
        if len(options) > 1 and tagged:  # the tag of a union ("fedpeft", "quantize"), which is no key of the recipe
            options = tagged
            continue
        words.append(str(part))
        if isinstance(part, str) and options:
            holder = options[0]
            field = holder.model_fields.get(part)
            options = [c for c in leaves(field.annotation) if isinstance(c, type) and issubclass(c, BaseModel)] if field else []
    return ".".join(words), holder


def leaves(annotation: Any) -> list[Any]:
    """All plain types inside an annotation."""
    inner = get_args(annotation)
    return [leaf for part in inner for leaf in leaves(part)] if inner else [annotation]


def tags(cls: type[BaseModel]) -> tuple[str, ...]:
    """The values of a class's discriminator (`type` of methods, `step` of transforms)."""
    field = cls.model_fields.get("type") or cls.model_fields.get("step")
    return tuple(str(t) for t in get_args(field.annotation)) if field else ()

"""A recipe: one TOML file describes a federation. What can be decided now is decided now, before any
download.

recipe = read("my.toml", ["rounds=3", "method.adapter.rank=4"])
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, Self, get_args

from pydantic import BaseModel, Field, PrivateAttr, ValidationError

from fedtune.aggregate import AggregateSettings, Mean
from fedtune.data.partition import Dirichlet, PartitionSettings
from fedtune.data.sources import DataSettings, Docstrings
from fedtune.errors import FedtuneError
from fedtune.methods import METHODS, FedPEFTTable, Method, MethodSettings, MethodTable
from fedtune.model.settings import ModelSettings
from fedtune.rules import check_rules
from fedtune.settings import Settings, path_below, tag_of, union_of
from fedtune.transforms import ChainStep
from fedtune.transforms.downlink import DownlinkSettings, Plain
from fedtune.wire.settings import LimitSettings


class SamplingSettings(Settings):
    """[sampling]: which clients are asked in a round, drawn with the run's seed."""

    fraction: float = Field(1.0, gt=0, le=1)
    """Share of the clients; at least one is asked."""
    count: int = Field(0, ge=0)
    """Number of clients; 0 means `fraction` decides."""

    def conflicts(self, recipe: Any) -> Iterator[tuple[str, str, str]]:
        if self.count and "fraction" in self.model_fields_set:
            yield "both sampling.count and sampling.fraction", "one of them", "remove one"
        if self.count > recipe.partition.clients and not recipe.partition.open_ended:
            yield (
                f"sampling.count = {self.count} of {recipe.partition.clients} clients",
                "at most that many clients",
                "lower sampling.count",
            )


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
    """Compare with clients that train alone, each for the steps of a client that takes part in every
    round."""
    centralised: bool = True
    """Compare with one training on the pooled data, for the same number of steps (or epochs, where steps =
    0)."""


class DeploySettings(Settings):
    """[deploy]: real sites (fedtune server, fedtune client). A simulation does not look at it, and a run's
    identity does not depend on it."""

    sites: tuple[str, ...] = ()
    """Names of the clients, as in their keys, in the order of their numbers; empty takes all clients of the
    allow list, sorted."""
    data: Literal["sites", "partition"] = "sites"
    """sites: every site has its own rows (fedtune client --data); partition: every site takes its part of
    [data], for demos."""
    test: str = ""
    """sites: a file or folder at the coordinator, in the form of [data], to score on; empty: sites score what
    they hold out themselves."""
    deadline: float = Field(3600.0, gt=0)
    """Seconds that sites have for one question; who is later is left out of the round."""
    quorum: float = Field(0.0, ge=0, le=1)
    """Share of the round's members whose answers must count; with fewer, the run pauses (exit code 75) until
    `fedtune resume`."""
    over: float = Field(0.0, ge=0, le=1)
    """Ask so many more members (a share) than [sampling] says, and end the round when as many as it says have
    answered."""

    def located(self, place: Path) -> Self:
        return self.model_copy(update={"test": path_below(place, self.test)})


class Recipe(Settings):
    """The whole file."""

    name: str = Field("", pattern=r"^[A-Za-z0-9._-]*$")
    """Folder of the run under runs/; empty takes the recipe's file name and the first free number."""
    seed: int = Field(1, ge=0)
    """Every random draw follows from it."""
    rounds: int = Field(10, ge=1)
    """Rounds of the federation."""
    model: ModelSettings = ModelSettings()
    data: DataSettings = Docstrings()
    partition: PartitionSettings = Dirichlet()
    method: MethodSettings = FedPEFTTable()
    sampling: SamplingSettings = SamplingSettings()
    chain: tuple[ChainStep, ...] = ()
    """Steps between a client's update and the server's sum, in the client's order."""
    downlink: DownlinkSettings = Plain()
    aggregate: AggregateSettings = Mean()
    limits: LimitSettings = LimitSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
    deploy: DeploySettings = DeploySettings()

    _notes: tuple[str, ...] = PrivateAttr(())  # what a run says about how its recipe was read

    @property
    def notes(self) -> tuple[str, ...]:
        return self._notes

    def canonical(self) -> str:
        """The resolved recipe as canonical JSON."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the canonical JSON, without the name and [deploy], as hex: the same recipe, the same
        bytes, wherever it runs."""
        known = self.model_dump(mode="json", exclude={"deploy"}) | {"name": ""}
        return hashlib.sha256(json.dumps(known, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def method_of(recipe: Recipe) -> Method:
    """The method that a recipe describes, for all of its rounds."""
    return recipe.method.build(recipe.rounds, recipe.aggregate)


def decided(
    recipe: Recipe, memory: Sequence[int] = (), labels: int | None = None, least: bool = False
) -> Recipe:
    """The recipe with nothing left open that depends on the clients: the same that somebody could have
    written by hand. As `MethodTable.decided`."""
    return (
        recipe.model_copy(update={"method": recipe.method.decided(recipe, memory, labels, least)})
        if recipe.method.undecided
        else recipe
    )


def read_method(table: Mapping[str, Any]) -> MethodTable:
    """A [method] table that this or an earlier version has written. Raises KeyError, pydantic's
    ValidationError."""
    cls = METHODS[table["type"]]
    return cls.model_validate_json(json.dumps(without_idle(with_defaults(dict(table), cls), cls)))


def read(path: str | None, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file (None: the built-in federation) and apply `path=value` overrides. Raises C101 to
    C105."""
    if path is None:
        text, stem = files("fedtune").joinpath("demo.toml").read_text(encoding="utf-8"), "demo"
    else:
        stem = Path(path).stem
        try:
            text = Path(path).expanduser().read_text(encoding="utf-8-sig")
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
        raise FedtuneError(
            "C103", sentence=f"'{path}' is not valid TOML ({error})", do="correct that line"
        ) from None
    return parse_with(tree, overrides, stem)


def parse_with(tree: dict[str, Any], overrides: Sequence[str], stem: str) -> Recipe:
    """A recipe from a parsed tree, which is changed, and overrides. Raises C101 to C104."""
    paths = [apply_override(tree, override) for override in overrides]
    dropped = [key for path in sorted(paths, key=len) for key in drop_unused(tree, path, set(paths))]
    recipe = parse(tree, stem)
    recipe._notes = tuple(
        f"--set left out {key} of the recipe, which the chosen {key.rpartition('.')[0]} does not have"
        for key in dropped
    )
    return recipe


def parse(tree: dict[str, Any], stem: str = "recipe") -> Recipe:
    """A recipe from a parsed tree. Raises C101, C102, C104."""
    try:
        recipe = Recipe.model_validate_json(
            json.dumps(with_all_values(with_defaults(tree, Recipe)), default=str)
        )
    except ValidationError as error:
        raise sentence(error) from None
    check_rules(recipe)
    return recipe


def with_all_values(tree: dict[str, Any]) -> dict[str, Any]:
    """Clients by a column are as many as it has values, unless the recipe says how many."""
    partition = tree.get("partition")
    if (
        isinstance(partition, dict)
        and partition.get("by") == "column"
        and not partition.keys() & {"clients", "all_values"}
    ):
        return {**tree, "partition": {**partition, "all_values": True}}
    return tree


def with_defaults(tree: Any, cls: type[BaseModel]) -> Any:
    """The tree with the discriminators that its tables leave out, by which the right class reads them."""
    if not isinstance(tree, dict):
        return tree
    made = dict(tree)
    for key in cls.model_fields:
        union, below = union_of(cls, key), made.get(key, {})
        if union and key in made and isinstance(below, dict):
            below = {union.discriminator: union.default} | below
            chosen = union.classes.get(str(below[union.discriminator]))
            made[key] = with_defaults(below, chosen) if chosen else below
    return made


def apply_override(tree: dict[str, Any], override: str) -> tuple[str, ...]:
    """Set one dotted path, which is returned; the value is read as TOML, and as a bare string where it is
    none."""
    path, equals, raw = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise FedtuneError(
            "C103",
            f"--set '{override}'",
            "path=value such as rounds=3",
            "write the path, an equals sign and the value",
        )
    try:
        value = tomllib.loads(f"v = {raw}")["v"]
    except tomllib.TOMLDecodeError:
        value = raw
    node: Any = tree
    for depth, key in enumerate(keys):
        last = depth == len(keys) - 1
        if isinstance(node, list):
            if not key.isdigit() or int(key) >= len(node):
                raise FedtuneError(
                    "C103",
                    f"--set '{override}'",
                    f"a number below {len(node)} after '{'.'.join(keys[:depth])}'",
                    "count the tables from 0",
                )
            node[int(key)] = value if last else node[int(key)]
            node = node[int(key)]
        elif isinstance(node, dict):
            node[key] = value if last else node.get(key, {})
            node = node[key]
        else:
            raise FedtuneError(
                "C103", f"--set '{override}'", f"a table at '{'.'.join(keys[:depth])}'", "shorten the path"
            )
    return tuple(keys)


def drop_unused(tree: dict[str, Any], keys: Sequence[str], overridden: set[tuple[str, ...]]) -> list[str]:
    """Where an override chose another class for a table, the file's keys that the class does not use go;
    returns their paths.

    What another override has set stays: if the class does not know it, that is an error.
    """
    table: Any = tree
    cls: type[BaseModel] | None = Recipe
    for key in keys[:-1]:
        table = table.get(key, {}) if isinstance(table, dict) else {}
        cls = class_at(cls, key, table) if cls else None
    chooses = cls is not None and issubclass(cls, Settings) and keys[-1] in (tag_of(cls)[0], cls.selector)
    return (
        prune(table, cls, tuple(keys[:-1]), overridden) if cls and chooses and isinstance(table, dict) else []
    )


def class_at(cls: type[BaseModel], key: str, table: Any) -> type[BaseModel] | None:
    """The class that reads the table under a key; None where there is none, or its discriminator says nothing
    known."""
    if union := union_of(cls, key):
        return (
            union.classes.get(str(table.get(union.discriminator, union.default)))
            if isinstance(table, dict)
            else None
        )
    inner = leaves(cls.model_fields[key].annotation) if key in cls.model_fields else []
    return (
        inner[0]
        if len(inner) == 1 and isinstance(inner[0], type) and issubclass(inner[0], BaseModel)
        else None
    )


def prune(
    table: dict[str, Any], cls: type[BaseModel], path: tuple[str, ...], overridden: set[tuple[str, ...]]
) -> list[str]:
    """Take out what a class does not use, in its tables as well; returns the paths of what went."""
    idle = cls.unused(table) if issubclass(cls, Settings) else set()
    gone = [
        key
        for key in sorted((table.keys() - cls.model_fields.keys()) | (table.keys() & idle))
        if not any(over[: len(path) + 1] == (*path, key) for over in overridden)
    ]
    for key in gone:
        del table[key]
    dropped = [".".join((*path, key)) for key in gone]
    for key, below in table.items():
        chosen = class_at(cls, key, below)
        if chosen and isinstance(below, dict):
            dropped += prune(below, chosen, (*path, key), overridden)
    return dropped


def without_idle(tree: Any, cls: type[BaseModel]) -> Any:
    """A recipe that version 0.1 wrote into a run's folder, without the keys that it kept for the classes that
    a table did not choose."""
    if not isinstance(tree, dict):
        return tree
    made = {}
    for key, below in tree.items():
        union = union_of(cls, key)
        chosen = (
            union.classes.get(str(below.get(union.discriminator, union.default)))
            if union and isinstance(below, dict)
            else None
        )
        if union and chosen:
            others = {
                name for other in union.classes.values() for name in other.model_fields
            } - chosen.model_fields.keys()
            below = without_idle({name: value for name, value in below.items() if name not in others}, chosen)
        made[key] = below
    return made


def sentence(error: ValidationError) -> FedtuneError:
    """The first mistake of a validation as one sentence."""
    first = min(error.errors(include_url=False), key=lambda e: e["type"] != "extra_forbidden")
    place, owner, siblings = resolve(first["loc"])
    if first["type"] == "extra_forbidden":
        return unknown_key(place, str(first["loc"][-1]), owner, siblings)
    if first["type"] == "union_tag_invalid":
        place, known = (
            f"{place}.{first['ctx']['discriminator'].strip(chr(39))}",
            first["ctx"]["expected_tags"],
        )
        return FedtuneError(
            "C102",
            f'{place} = "{first["ctx"]["tag"]}"',
            f"one of {known}",
            f"change {place} in the recipe or with --set",
        )
    if first["type"] in ("missing", "union_tag_not_found"):
        key = (
            place if first["type"] == "missing" else f"{place}.{first['ctx']['discriminator'].strip(chr(39))}"
        )
        return FedtuneError("C102", sentence=f"{key} is missing", do="add it to the recipe or with --set")
    value = json.dumps(first.get("input"), default=str)
    words = first["msg"][0].lower() + first["msg"][1:]
    for begins, better in PYDANTIC.items():
        words = re.sub(f"^{begins}", better, words)
    return FedtuneError(
        "C102", f"{place} = {value[:80]}", words, f"change {place} in the recipe or with --set"
    )


PYDANTIC = {  # how its messages begin, and what reads well behind "expected"
    "input should be ": "",
    "(?=greater|less)": "a number ",
    "string should match pattern ": "text of the form ",
    "string should have ": "text with ",
    "(list|tuple) should have ": "a list with ",
    "a valid (list|tuple|array)": "a list",
    "an object|a valid dictionary.*": "a table",
    "a valid string": "text",
}


def unknown_key(
    place: str, key: str, owner: type[BaseModel] | None, siblings: Sequence[type[BaseModel]]
) -> FedtuneError:
    """A key that a table does not have: a near miss (C101), or a key of another class of the same union
    (C104)."""
    known = list(owner.model_fields) if owner else []
    others = [value for cls in siblings if key in cls.model_fields for value in tag_of(cls)[1]]
    if owner and others:
        selector, (own, *_) = tag_of(owner)
        chooser = f"{place.rpartition('.')[0]}.{selector}"
        return FedtuneError(
            "C104",
            f"{place} with {chooser} = '{own}'",
            f"one of {', '.join(known)}",
            f"remove it, or set {chooser} to {' or '.join(others)}",
        )
    near = difflib.get_close_matches(key, known, 1)
    homes = sorted(home for home in places_of(key, Recipe) if home != place)
    hint = (
        f"write {homes[0]}, where that key stands" if homes else f"write '{near[0]}'" if near else "remove it"
    )
    return FedtuneError("C101", f"unknown key '{place}'", f"one of {', '.join(known)}", hint)


def places_of(key: str, cls: type[BaseModel], path: str = "") -> set[str]:
    """Dotted paths of all keys of that name in any table of a recipe."""
    found = {f"{path}{key}"} if key in cls.model_fields else set()
    for name, field in cls.model_fields.items():
        for below in leaves(field.annotation):
            if isinstance(below, type) and issubclass(below, BaseModel):
                found |= places_of(key, below, f"{path}{name}.")
    return found


def resolve(loc: tuple[int | str, ...]) -> tuple[str, type[BaseModel] | None, Sequence[type[BaseModel]]]:
    """A pydantic location as a dotted recipe path, the settings class that holds its last key, and the
    classes of the union that this one is of."""
    words: list[str] = []
    options: list[type[BaseModel]] = [Recipe]
    siblings: list[type[BaseModel]] = []
    holder: type[BaseModel] | None = None
    for part in loc:
        tagged = [c for c in options if part in tags(c)]
        if (
            len(options) > 1 and tagged
        ):  # the tag of a union ("fedpeft", "quantize"), which is no key of the recipe
            siblings, options = options, tagged
            continue
        words.append(str(part))
        if isinstance(part, str) and options:
            holder = options[0]
            siblings = siblings if holder in siblings else []
            field = holder.model_fields.get(part)
            options = (
                [c for c in leaves(field.annotation) if isinstance(c, type) and issubclass(c, BaseModel)]
                if field
                else []
            )
    return ".".join(words), holder, siblings


def leaves(annotation: Any) -> list[Any]:
    """All plain types inside an annotation."""
    inner = get_args(annotation)
    return [leaf for part in inner for leaf in leaves(part)] if inner else [annotation]


def tags(cls: type[BaseModel]) -> tuple[str, ...]:
    """The values of a class's discriminator (`type` of methods, `step` of transforms, `rule` of
    aggregation)."""
    return tag_of(cls)[1]

"""A recipe: one TOML file describes a federation. What can be decided now is decided now, before any
download.

recipe = read("my.toml", ["rounds=3", "method.adapter.rank=4"])
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, Field, PrivateAttr, ValidationError

from fedtune.aggregate import AggregateSettings, Mean
from fedtune.data.partition import Dirichlet, PartitionSettings
from fedtune.data.sources import DataSettings, Docstrings
from fedtune.errors import FedtuneError
from fedtune.methods import METHODS, FedPEFTTable, Method, MethodSettings, MethodTable
from fedtune.metrics import GenerateSettings, MetricTable
from fedtune.model.settings import ModelSettings
from fedtune.overrides import apply_override, drop_unused
from fedtune.privacy.releases import Release
from fedtune.privacy.settings import PrivacySettings, spent_before
from fedtune.recipes import BUILT_IN, text_of
from fedtune.rules import check_rules
from fedtune.selection import SelectTable
from fedtune.settings import Settings, path_below, union_of
from fedtune.sinks import SinkTable
from fedtune.transforms import ChainStep
from fedtune.transforms.downlink import Auto as AutoDownlink
from fedtune.transforms.downlink import DownlinkSettings
from fedtune.validation import sentence
from fedtune.wire.settings import LimitSettings


class SamplingSettings(Settings):
    """[sampling]: which clients are asked in a round, drawn with the run's seed."""

    fraction: float = Field(1.0, gt=0, le=1)
    """Share of the clients; at least one is asked."""
    count: int = Field(0, ge=0)
    """Number of clients; 0 means `fraction` decides."""
    without: tuple[str, ...] = ()
    """Names of clients that never take part. What is drawn for the others stays as it is: a place in a round
    that falls to one of these stays empty, and their rows train, score and choose nothing."""

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
    """Score every so many rounds, and the last one, on rows that clients hold out (the test set's, where they
    hold out none), and keep the best round's model beside the last one; 0 keeps the last."""
    rows: int = Field(0, ge=0)
    """So many of these rows at most, drawn with the run's seed; 0 means all."""
    batch: int = Field(32, ge=1)
    """Examples per forward pass."""
    clients: bool = True
    """After the last round, also score every client's own held-out rows: mean, worst and spread."""
    base: bool = True
    """Score the model before any training."""
    local: bool = True
    """Compare with clients that train alone, each for the steps of a client that takes part in every
    round."""
    centralised: bool = True
    """Compare with one training on the pooled data: as many steps as a client makes in all rounds, each on
    the batches of all clients that a round asks."""
    seeds: int = Field(1, ge=1)
    """Train each comparison so many times, with different seeds; the result has the means."""


class StopSettings(Settings):
    """[stop]: end the run before its last round, where scores no longer get better."""

    patience: int = Field(0, ge=0)
    """Stop after so many scores in a row (evaluate.every) without a better one; 0 means never."""
    min_delta: float = Field(0.0, ge=0)
    """What a score has to gain to count as better here; the best round is the best by any margin."""

    def conflicts(self, recipe: Any) -> Iterator[tuple[str, str, str]]:
        if self.patience and not recipe.evaluate.every:
            yield (
                f"stop.patience = {self.patience} with evaluate.every = 0",
                "scores to wait for",
                "set evaluate.every = 1",
            )


class WatchSettings(Settings):
    """[watch]: what the coordinator looks at after a round, to notice a client that does harm. Clients are
    not told, and a run's identity does not depend on it."""

    every: int = Field(0, ge=0)
    """Score canary rows after every so many rounds and the last one; 0 means never."""
    data: str = ""
    """A file or folder of canary rows, in the form of [data]; empty takes rows that clients hold out (the
    test set's, where they hold out none)."""
    rows: int = Field(64, ge=1)
    """So many of them at most, drawn with the run's seed."""
    triggers: tuple[str, ...] = ()
    """Phrases that somebody may have planted: each is put in front of the canary rows' texts, where it should
    change nothing."""
    rise: float = Field(0.5, gt=0)
    """Alarm where the canary rows' loss is so many nats above its least so far, or where a trigger costs them
    so many more than it did at first."""
    refusals: int = Field(0, ge=0)
    """So many canary prompts are answered, and answers that refuse are counted (task instruct); alarm where
    their share has moved by a fifth."""
    influence: bool = False
    """Say after each round what each member contributed: how far its answer moves the state, its cosine to
    the others' mean, and how far the mean moves without it; alarm where it points away from the others."""
    pause: bool = False
    """After an alarm the run pauses (exit code 75) until `fedtune resume`."""

    def conflicts(self, recipe: Any) -> Iterator[tuple[str, str, str]]:
        if self.triggers and recipe.data.task == "image-classify":
            yield "watch.triggers for images", "texts to put them in front of", "remove watch.triggers"
        if self.refusals and recipe.data.task != "instruct":
            yield (
                f"watch.refusals = {self.refusals} with data.task = '{recipe.data.task}'",
                "data.task = 'instruct'",
                "set watch.refusals = 0",
            )
        if (self.triggers or self.refusals or self.data) and not self.every:
            yield "watch.every = 0 with canary rows to score", "1 or more", "set watch.every = 1"

    def located(self, place: Path) -> Self:
        return self.model_copy(update={"data": path_below(place, self.data)})


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
    select: tuple[SelectTable, ...] = ()
    """What each client does with its training rows before the first round, in this order."""
    method: MethodSettings = FedPEFTTable()
    sampling: SamplingSettings = SamplingSettings()
    chain: tuple[ChainStep, ...] = ()
    """Steps between a client's update and the server's sum, in the client's order."""
    downlink: DownlinkSettings = AutoDownlink()
    privacy: PrivacySettings = PrivacySettings()
    aggregate: AggregateSettings = Mean()
    limits: LimitSettings = LimitSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
    stop: StopSettings = StopSettings()
    watch: WatchSettings = WatchSettings()
    metrics: tuple[MetricTable, ...] = ()
    """Figures of the final model on the test set, beside accuracy or perplexity."""
    generate: GenerateSettings = GenerateSettings()
    deploy: DeploySettings = DeploySettings()
    sinks: tuple[SinkTable, ...] = ()
    """Where the run's events go beside its folder and the console; a run's identity does not depend on it."""

    _notes: tuple[str, ...] = PrivateAttr(())  # what a run says about how its recipe was read

    @property
    def notes(self) -> tuple[str, ...]:
        return self._notes

    @property
    def spends(self) -> tuple[Release, ...]:
        """What one answer of a client gives away of it or of one of its rows; () where nothing bounds it."""
        every = (*(step.spends for step in self.chain), self.method.spends)
        return tuple(release for release in every if release)

    @property
    def spends_before(self) -> tuple[Release, ...]:
        """The same of the questions before the first round, which are asked once."""
        return spent_before(self) if self.spends else ()

    def canonical(self) -> str:
        """The resolved recipe as canonical JSON, as clients get it: without [watch] and [[sinks]], which are
        only for the process that runs the rounds."""
        known = self.model_dump(mode="json", exclude={"sinks", "watch"})
        return json.dumps(known, sort_keys=True, separators=(",", ":"))

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the canonical JSON, without the name, [deploy], [watch], [[sinks]] and data.cache, as
        hex: the same recipe, the same bytes, wherever it runs."""
        left_out: dict[str, Any] = {"deploy": True, "sinks": True, "watch": True, "data": {"cache"}}
        known = self.model_dump(mode="json", exclude=left_out) | {"name": ""}
        return hashlib.sha256(json.dumps(known, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def method_of(recipe: Recipe) -> Method:
    """The method that a recipe describes, for all of its rounds."""
    return recipe.method.build(recipe.rounds, recipe.aggregate)


def decided(
    recipe: Recipe, memory: Sequence[int] = (), labels: int | None = None, least: bool = False
) -> Recipe:
    """The recipe with nothing left open that depends on the model or the clients: the same that somebody
    could have written by hand. As `MethodTable.decided`, and as `with_rates`."""
    rated = with_rates(recipe)
    return (
        rated.model_copy(update={"method": rated.method.decided(rated, memory, labels, least)})
        if rated.method.undecided
        else rated
    )


def with_rates(recipe: Recipe) -> Recipe:
    """The recipe with learning rates as numbers; reads the model's config.json where one says "auto". Raises
    M301, M306."""
    if not recipe.method.rates_open:
        return recipe
    from fedtune.model.base import width_at

    width = width_at(recipe.model, recipe.data.task)
    return recipe.model_copy(update={"method": recipe.method.with_rates(width)})


def read_method(table: Mapping[str, Any]) -> MethodTable:
    """A [method] table that this or an earlier version has written. Raises KeyError, pydantic's
    ValidationError."""
    cls = METHODS[table["type"]]
    return cls.model_validate_json(json.dumps(without_idle(with_defaults(dict(table), cls), cls)))


def read(path: str | None, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file, or a built-in one by its name (None: the first of BUILT_IN), and apply `path=value`
    overrides. Raises C101 to C105."""
    name = BUILT_IN[0] if path is None else path
    if name in BUILT_IN and (path is None or not Path(name).exists()):
        return parsed(text_of(name), overrides, name)
    try:
        text = Path(name).expanduser().read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise FedtuneError(
            "C105",
            f"no readable recipe at '{path}' ({type(error).__name__})",
            "a TOML file",
            f"check the path, or run a built-in federation ({', '.join(BUILT_IN)})",
        ) from None
    return parsed(text, overrides, Path(name).stem, name)


def parsed(text: str, overrides: Sequence[str], stem: str, path: str = "") -> Recipe:
    """A recipe from a file's text. Raises C101 to C104."""
    try:
        tree = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise FedtuneError(
            "C103", sentence=f"'{path or stem}' is not valid TOML ({error})", do="correct that line"
        ) from None
    return parse_with(tree, overrides, stem)


def parse_with(tree: dict[str, Any], overrides: Sequence[str], stem: str) -> Recipe:
    """A recipe from a parsed tree, which is changed, and overrides. Raises C101 to C104."""
    paths = [apply_override(tree, override) for override in overrides]
    dropped = [key for path in sorted(paths, key=len) for key in drop_unused(tree, Recipe, path, set(paths))]
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
        raise sentence(error, Recipe) from None
    check_rules(recipe)
    return with_downlink(recipe)


def with_downlink(recipe: Recipe) -> Recipe:
    """The recipe with the first code of the way down that may stand in it."""
    for code in recipe.downlink.choices(recipe):
        chosen = recipe.model_copy(update={"downlink": code})
        with suppress(FedtuneError):
            check_rules(chosen)
            return chosen
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

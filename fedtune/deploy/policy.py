"""What a site allows, in a file of its own: the coordinator cannot change it.

coordinators = ["3f9a..."]       # keys that may ask, by their hash or its beginning; empty: the federation's
approved_only = true             # only recipes that this site's operator has approved: fedtune approve RECIPE
approvals = 2                    # by so many of this machine's users (four eyes); 1 where nothing is said
recipes = ["c0ffee..."]          # or these, by their whole hash
methods = ["fedpeft"]            # what may be done here; empty: everything
adapters = ["lora"]              # what may be trained; empty: everything
models = ["/models/llama"]       # base models, as the recipe or --model names them; empty: every one
require = ["sign"]               # chain steps without which nothing leaves the house
sums_only = true                 # nothing that the coordinator could read singly: only under the step "mask"
max_norm = 0.5                   # greatest length of what an answer changes; longer ones are cut here
noise = 1.0                      # noise of this site's own on every answer, in multiples of max_norm
max_epsilon = 8.0                # of a row here, over everything that this site has ever answered
delta = 1e-5                     # that max_epsilon is counted at
min_class_rows = 5               # fewest rows of a class whose sum is told
verbs = ["train"]                # what may be asked; empty: all that the method asks
scores = false                   # whether figures of held-out rows may leave (the verb `score`)
min_rows = 100                   # least rows that train; 8 where nothing is said
min_examples = 64                # least steps times what trains of a batch, for one update; 8 by default
min_steps = 10                   # least steps of an update, where the recipe counts them
min_batch = 4                    # least rows in a batch that train
min_members = 3                  # least members in a round
max_rounds = 50                  # most rounds of a run
answers_a_day = 100              # most answers in 24 hours
bytes_a_day = 1_000_000_000      # and their bytes
update_bytes = 50_000_000        # most bytes of one update; 0: the coordinator's budget
minutes = 120                    # most minutes of work for one answer; a day where nothing is said
hours = "20-06"                  # of the day, by this machine's clock, from the first to before the second
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from os.path import expanduser
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from fedtune import transforms
from fedtune.config import Recipe, method_of
from fedtune.errors import FedtuneError
from fedtune.methods.head_start import FEATURES
from fedtune.runtime.site_scores import SCORE
from fedtune.runtime.task import chain_for
from fedtune.settings import Settings
from fedtune.validation import sentence

MASK = "mask"  # the step of a chain behind which only sums can be read


@dataclass(frozen=True)
class Asked:
    """What a coordinator wants, beside the recipe.

    recipe    its hash, as it came: the site's own model is in the other
    members   of the round; rounds of the run are the recipe's
    key       hash of the coordinator's key
    approved  hashes of recipes that this site's operator has approved
    sent      bytes of every answer of the last day
    """

    recipe: str = ""
    verb: str = "train"
    budget: int = 0
    members: int = 1 << 30
    key: str = ""
    approved: frozenset[str] = frozenset()
    sent: tuple[int, ...] = ()
    now: datetime = field(default_factory=datetime.now)


class Policy(Settings):
    """The file's keys."""

    coordinators: tuple[str, ...] = ()
    approved_only: bool = False
    approvals: int = Field(1, ge=1)
    recipes: tuple[str, ...] = ()
    methods: tuple[str, ...] = ()
    adapters: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    require: tuple[str, ...] = ()
    sums_only: bool = False
    max_norm: float = Field(0.0, ge=0)
    noise: float = Field(0.0, ge=0)
    max_epsilon: float = Field(0.0, ge=0)
    delta: float = Field(1e-5, gt=0, lt=1)
    min_class_rows: int = Field(1, ge=1)
    verbs: tuple[str, ...] = ()
    scores: bool = True
    min_rows: int = Field(8, ge=1)
    min_examples: int = Field(8, ge=1)
    min_steps: int = Field(1, ge=1)
    min_batch: int = Field(1, ge=1)
    min_members: int = Field(1, ge=1)
    max_rounds: int = Field(0, ge=0)
    answers_a_day: int = Field(0, ge=0)
    bytes_a_day: int = Field(0, ge=0)
    update_bytes: int = Field(0, ge=0)
    minutes: int = Field(24 * 60, ge=1)
    hours: str = Field("", pattern=r"^$|^([01]\d|2[0-3])-([01]\d|2[0-4])$")

    def check(self, recipe: Recipe, asked: Asked) -> None:
        """Before anything is read or loaded. Raises F507."""
        self._who(recipe, asked)
        steps = steps_for(recipe, asked.verb)
        adapter = str(recipe.method.model_dump().get("adapter", {}).get("kind", "")) or "full"
        if self.methods and recipe.method.type not in self.methods:
            raise forbidden(f"method '{recipe.method.type}'", f"one of {', '.join(self.methods)}")
        if self.adapters and adapter not in self.adapters:
            raise forbidden(f"an adapter of kind '{adapter}'", f"one of {', '.join(self.adapters)}")
        if self.models and expanduser(recipe.model.name) not in map(expanduser, self.models):
            raise forbidden(f"base model '{recipe.model.name}'", f"one of {', '.join(self.models)}")
        if lacking := [name for name in self.require if name not in steps]:
            without = f"a message chain without '{lacking[0]}' for '{asked.verb}'"
            raise forbidden(without, f"one with {', '.join(self.require)}")
        if self.sums_only and (MASK not in steps or reads_single(recipe, asked.verb)):
            raise forbidden(
                f"'{asked.verb}' without a mask, or read singly",
                f"sums under [[chain]] step = '{MASK}' only (sums_only)",
            )
        if self.update_bytes and asked.budget > self.update_bytes:
            raise forbidden(f"updates of up to {asked.budget} bytes", f"at most {self.update_bytes}")
        if asked.verb == SCORE and not self.scores:
            raise forbidden("a score of rows that are held out here", "none")
        if self.verbs and asked.verb != SCORE and asked.verb not in self.verbs:
            raise forbidden(f"the verb '{asked.verb}'", f"one of {', '.join(self.verbs)}")
        if asked.members < self.min_members:
            raise forbidden(f"a round of {asked.members} members", f"at least {self.min_members}")
        if self.max_rounds and recipe.rounds > self.max_rounds:
            raise forbidden(f"a run of {recipe.rounds} rounds", f"at most {self.max_rounds}")
        if asked.verb != SCORE and (seen := examples_of(recipe, 1 << 30)) < self.min_examples:
            raise forbidden(f"an update of {seen} examples", f"at least {self.min_examples}")
        for name, least in (("steps", self.min_steps), ("batch", self.min_batch)):
            if asked.verb != SCORE and (found := least_of(recipe, name)) < least:
                raise forbidden(f"a recipe with {name} = {found}", f"at least {least}")

    def _who(self, recipe: Recipe, asked: Asked) -> None:
        """By whom, with which recipe, when, and how often."""
        if self.coordinators and not any(
            asked.key.startswith(known) for known in self.coordinators if len(known) >= 12
        ):
            raise forbidden(
                f"a coordinator with key {asked.key[:12]}",
                f"one of {', '.join(known[:12] for known in self.coordinators)}",
            )
        if (self.approved_only or self.recipes) and (hash_ := asked.recipe or recipe.fingerprint) not in {
            *self.recipes,
            *asked.approved,
        }:
            raise forbidden(
                f"recipe {hash_}, which nobody here has approved", "an approved one (fedtune approve RECIPE)"
            )
        if self.hours and not within(self.hours, asked.now.hour):
            raise forbidden(
                f"work at {asked.now:%H:%M}", f"work from {self.hours.replace('-', ' to ')} o'clock"
            )
        if self.answers_a_day and len(asked.sent) >= self.answers_a_day:
            raise forbidden(
                f"one more than {len(asked.sent)} answers in 24 hours", f"at most {self.answers_a_day}"
            )
        if self.bytes_a_day and sum(asked.sent) + asked.budget > self.bytes_a_day:
            raise forbidden(
                f"up to {sum(asked.sent) + asked.budget} bytes in 24 hours", f"at most {self.bytes_a_day}"
            )

    def check_classes(self, verb: str, counts: Mapping[str, int]) -> None:
        """Before sums by class are told: of a class with one row, the sum is that row. Raises F507."""
        if verb == FEATURES and counts and min(counts.values()) < self.min_class_rows:
            raise forbidden(
                f"a sum of {min(counts.values())} rows of a class",
                f"at least {self.min_class_rows} (min_class_rows)",
            )

    def check_rows(self, recipe: Recipe, rows: int) -> None:
        """Once the rows are known, before any is trained on: an update of one row says what stands in it.
        Raises F507."""
        if rows < self.min_rows:
            raise forbidden(f"{rows} rows that train", f"at least {self.min_rows}")
        if (seen := examples_of(recipe, rows)) < self.min_examples:
            raise forbidden(f"an update of {seen} examples", f"at least {self.min_examples}")

    def check_trained(self, rows: int, steps: int, batch: int) -> None:
        """What this site's own script has trained on, by the lines that a recipe's numbers are held to: its
        rows, in so many steps of so many rows each. Raises F507."""
        seen = min(rows, steps * batch)
        for name, found, least in (
            ("min_rows", rows, self.min_rows),
            ("min_examples", seen, self.min_examples),
            ("min_steps", steps, self.min_steps),
            ("min_batch", batch, self.min_batch),
        ):
            if found < least:
                raise FedtuneError(
                    "F507",
                    f"{found} {name.removeprefix('min_')} behind an update of this site's own script",
                    f"at least {least} ({name})",
                    "let the script train on more, or change the site's policy file",
                )


def examples_of(recipe: Recipe, rows: int) -> int:
    """Different examples that one update is made of, by the method's own settings: at least, where a
    curriculum or a choice within batches leaves some out."""
    method = recipe.method.model_dump()
    train = method.get("train", {})
    private = train.get("private", {})
    if private.get("max_grad_norm") and train["steps"]:  # rows are in a step by chance
        return min(rows, int(rows * private["sample_rate"] * train["steps"]))
    drawn = math.ceil(rows * train.get("curriculum", {}).get("start", 1.0))
    counts = [
        min(drawn, table["steps"] * batch)
        if table.get("steps")
        else min(drawn, int(rows * kept_of(table))) * int(bool(table.get("epochs", 1)))
        for table, batch in batches_of(recipe)
    ]
    return min(counts, default=rows)


def least_of(recipe: Recipe, name: str) -> int:
    """The smallest number of steps, or of rows in a batch that train, that a recipe names; a recipe of passes
    over all rows has as many steps as they make."""
    found = [batch if name == "batch" else table.get(name) for table, batch in batches_of(recipe)]
    return min((int(number) for number in found if number), default=1 << 30)


def batches_of(recipe: Recipe) -> list[tuple[Mapping[str, Any], int]]:
    """The tables of a method that name a batch, and how many of its rows train."""
    method = recipe.method.model_dump()
    tables = [table for table in (method, method.get("train", {})) if "batch" in table]
    return [(table, max(1, round(table["batch"] * kept_of(table)))) for table in tables]


def kept_of(table: Mapping[str, Any]) -> float:
    """The share of a batch that trains (method.train.uds)."""
    return float(table.get("uds", {}).get("keep", 1.0))


def reads_single(recipe: Recipe, verb: str) -> bool:
    """Whether the recipe's method reads single answers to a question."""
    about = method_of(recipe).verbs.get(verb)
    return about is not None and about.reads_each


def steps_for(recipe: Recipe, verb: str) -> list[str]:
    """Names of the steps that answers to a question go through."""
    about, chain = method_of(recipe).verbs.get(verb), transforms.build(recipe.chain)
    return [step.name for step in (chain_for(about, chain) if about else chain).steps]


def within(hours: str, hour: int) -> bool:
    """Whether an hour is inside a span that may go over midnight."""
    first, last = map(int, hours.split("-"))
    return first <= hour < last if first < last else hour >= first or hour < last


def forbidden(found: str, expected: str) -> FedtuneError:
    return FedtuneError("F507", found, expected, "agree on the recipe, or change the site's policy file")


def read_policy(path: str) -> Policy:
    """The site's file, "" for none: what stands above as a default. Raises C101 to C105."""
    if not path:
        return Policy()
    try:
        policy = Policy.model_validate(
            tomllib.loads(Path(path).expanduser().read_text(encoding="utf-8-sig")), strict=False
        )
    except (OSError, UnicodeDecodeError) as error:
        raise FedtuneError(
            "C105",
            f"no readable policy at '{path}' ({type(error).__name__})",
            "a TOML file",
            "check the path",
        ) from None
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise FedtuneError(
            "C103", sentence=f"'{path}' is not valid TOML ({error})", do="correct that line"
        ) from None
    except ValidationError as error:
        raise sentence(error, Policy) from None
    if policy.noise and not policy.max_norm:
        raise FedtuneError(
            "C104",
            f"noise = {policy.noise} without max_norm",
            "a length that it is a multiple of",
            "set max_norm",
        )
    return policy

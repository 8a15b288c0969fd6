"""Who takes part, under which number, and what each side of a deployment holds of the data."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from fedtune.config import Recipe
from fedtune.data import Federation, Slice, load, load_slice
from fedtune.data.settings import PathSource, Source
from fedtune.data.sources import data_at
from fedtune.errors import FedtuneError, Refused
from fedtune.forms import read_json
from fedtune.runtime.masked_tasks import root_of
from fedtune.runtime.workspace import verbs_of
from fedtune.trust import COORDINATOR
from fedtune.trust.allowed import read_entries
from fedtune.trust.certificates import utc_now
from fedtune.trust.identity import ALLOWED

UPDATE = "install the same version of fedtune on both sides"


def resolved(recipe: Recipe, keys: Path) -> Recipe:
    """The recipe with its sites named: deploy.sites, or all clients that may speak now, sorted. Raises C104,
    F502, T702."""
    now = utc_now()
    allowed = sorted(
        {entry.name for entry in read_entries(keys / ALLOWED) if entry.state(now) == "valid"} - {COORDINATOR}
    )
    sites = recipe.deploy.sites or tuple(allowed)
    if not sites:
        raise FedtuneError(
            "F502", "no client with a valid key", "one or more", "run: fedtune keys issue NAME"
        )
    if unknown := sorted(set(sites) - set(allowed)):
        raise FedtuneError(
            "F502",
            f"deploy.sites with '{unknown[0]}', which has no valid key",
            f"some of {', '.join(allowed)[:200]}",
            f"run: fedtune keys issue {unknown[0]}",
        )
    require_for_sites(recipe, sites)
    return recipe.model_copy(update={"deploy": recipe.deploy.model_copy(update={"sites": tuple(sites)})})


def require_for_sites(recipe: Recipe, sites: Sequence[str]) -> None:
    """Whether a recipe can be played by these sites, as far as the recipe says; () where they are not known
    yet. Raises C104, D206."""
    if (
        recipe.deploy.data == "sites"
        and recipe.data.task in ("classify", "image-classify")
        and not recipe.data.labels
    ):
        raise FedtuneError(
            "D206",
            "no data.labels in a recipe for real sites",
            "the label set",
            "list all labels in data.labels",
        )
    if len(set(sites)) < len(sites):
        raise FedtuneError("C104", "deploy.sites with a name twice", "each site once", "remove one")
    if (
        sites
        and recipe.deploy.data == "partition"
        and recipe.partition.clients != len(sites)
        and not recipe.partition.open_ended
    ):
        found = (
            f"partition.clients = {recipe.partition.clients} beside {len(sites)} sites "
            f"({', '.join(sites)[:120]})"
        )
        raise FedtuneError(
            "C104", found, "as many of one as of the other", f"use --set partition.clients={len(sites)}"
        )


def at_coordinator(recipe: Recipe) -> Federation:
    """Names, the label set, and rows to score on, where there are some. Raises what the data raise."""
    deploy = recipe.deploy
    if deploy.data == "partition":
        return load(recipe.data, recipe.partition, recipe.seed)
    test: list[dict[str, Any]] = []
    if deploy.test:
        data = data_at(recipe.data, deploy.test, client_test_share=0.0, limit=0, group="", share=0.0)
        with called("data.path", "deploy.test"):
            mine, _ = load_slice(data, recipe.seed, 0, "the coordinator")
        test = [*mine.train, *mine.test]
    require_for_sites(recipe, ())
    return Federation(
        tuple(Slice(number, name, [], []) for number, name in enumerate(deploy.sites)),
        test,
        recipe.data.labels,
    )


ROLES = {  # task -> settings that name a column
    "causal-lm": ("text",),
    "classify": ("text", "label"),
    "image-classify": ("image", "label"),
    "instruct": ("messages", "prompt", "response"),
    "preference": ("prompt", "chosen", "rejected"),
}
COLUMN = re.compile(r"\{([^{}]+)\}")


def columns_of(text: str) -> dict[str, str]:
    """--map text=note,label=icd: the recipe's name of a column -> its name here. Raises C103."""
    pairs = [part.partition("=") for part in text.split(",") if part.strip()]
    if any(not equals or not name.strip() or not own.strip() for name, equals, own in pairs):
        raise FedtuneError(
            "C103", f"--map '{text}'", "NAME=COLUMN,NAME=COLUMN, such as text=note,label=icd", "correct --map"
        )
    return {name.strip(): own.strip() for name, _, own in pairs}


def mapped(data: Source, columns: Mapping[str, str]) -> dict[str, str]:
    """Settings of [data] with this site's columns. Where a site maps columns, a recipe reaches those and no
    others. Raises F507."""
    if not columns:
        return {}

    def own(name: str) -> str:
        if name not in columns:
            raise FedtuneError(
                "F507",
                f"a recipe that reads column {name[:80]!r}",
                f"one of {', '.join(columns)}",
                "agree on it, and name it in --map",
            )
        return columns[name]

    named: dict[str, Any] = data.model_dump()
    roles = [role for role in ROLES[data.task] if named[role]]
    if data.task == "instruct" and data.messages:
        roles = ["messages"]
    elif "{" in data.template:  # which names the prompt's column where it has one
        roles = [role for role in roles if role != "prompt"]
    made = {role: own(named[role]) for role in [*roles, *(["group"] if data.group else [])]}
    if "{" in data.template:
        inner = [name for name in COLUMN.findall(data.template) if name not in ("prompt", "response")]
        template = COLUMN.sub(
            lambda found: f"{{{own(found[1])}}}" if found[1] in inner else found[0], data.template
        )
        made |= {"template": template} | ({"prompt": own(data.prompt)} if "{prompt}" in data.template else {})
    return made


def at_site(
    recipe: Recipe,
    number: int,
    data: str,
    partition: bool = False,
    columns: Mapping[str, str] | None = None,
    shared: str = "",
) -> Federation:
    """One site's own rows, under its number; of the others nothing. They come from `data`, and those that all
    sites share from `shared`, and from nowhere else: what a recipe names is read only where the
    site's operator has said so (`partition`, for demos). Raises F507, and what the data raise."""
    if recipe.deploy.data == "partition":
        if not partition:
            raise FedtuneError(
                "F507",
                "a recipe that says which rows are read here (deploy.data = 'partition')",
                "rows of --data",
                "for a demo: --partition",
            )
        return load(recipe.data, recipe.partition, recipe.seed)
    if not isinstance(recipe.data, PathSource):
        found = f"data.source = '{recipe.data.source}', which reads what is installed here"
        raise FedtuneError(
            "F507",
            found,
            "a source that reads --data",
            "set data.source to the format of the sites' rows: jsonl, csv, parquet",
        )
    if not data:
        raise FedtuneError(
            "D201", "no data of this site", "a file or folder", "start it with: fedtune client --data FILE"
        )
    if recipe.data.share and not shared:
        raise FedtuneError(
            "D201",
            f"no shared rows of this site, where data.share = {recipe.data.share}",
            "its copy of them",
            "start it with: fedtune client --shared FILE",
        )
    name = recipe.deploy.sites[number]
    own = {**mapped(recipe.data, columns or {}), "shared": shared}
    with called("data.path", "--data"):
        mine, dropped = load_slice(data_at(recipe.data, data, **own), recipe.seed, number, name)
    slices = tuple(
        mine if other == number else Slice(other, whose, [], [])
        for other, whose in enumerate(recipe.deploy.sites)
    )
    return Federation(slices, [], recipe.data.labels, dropped)


@contextlib.contextmanager
def called(setting: str, here: str) -> Iterator[None]:
    """A mistake's words, with the name by which whoever reads them set the value."""
    try:
        yield
    except FedtuneError as error:
        raise type(error)(error.code, error.found, error.expected, error.do.replace(setting, here)) from error


@dataclass(frozen=True)
class Details:
    """What a ticket says beside what every ticket says.

    recipe   the coordinator's, as canonical JSON
    number   of the client; `seed`, `members` of the round; `last`, `first` as in runtime.protocol.Ask
    told     what the method wants its clients to know
    issued   when it was signed, in microseconds since 1970, which is its number, too: the coordinator's next
             has a higher one
    ends     until when it may be done; 0, from a coordinator of the version before: as long as its round is
             open
    """

    recipe: str
    number: int
    seed: int
    members: tuple[int, ...]
    last: int
    first: bool
    told: dict[str, str]
    issued: int = 0
    ends: int = 0

    def require_open(self, now: float) -> None:
        """Raises Refused (W604) for a ticket that has ended: found by somebody, or kept, and sent again."""
        if self.ends and now > self.ends / 1e6:
            raise Refused(
                "W604",
                f"a ticket that ended {now - self.ends / 1e6:.0f} s ago",
                "one that may still be done",
                "check this machine's clock (NTP)",
            )

    def encode(self) -> str:
        return json.dumps(
            {**self.__dict__, "members": list(self.members)}, sort_keys=True, separators=(",", ":")
        )

    @classmethod
    def decode(cls, text: str) -> Details:
        """Raises Refused (W601)."""
        try:
            tree = read_json(text)
            told = {str(name): str(value) for name, value in tree["told"].items()}
            members = tuple(int(m) for m in tree["members"])
            said = cls(
                str(tree["recipe"]),
                int(tree["number"]),
                int(tree["seed"]),
                members,
                int(tree["last"]),
                bool(tree["first"]),
                told,
                int(tree.get("issued", 0)),
                int(tree.get("ends", 0)),
            )
            if any(not 0 <= number < 1 << 31 for number in (said.number, said.last, *members)):
                raise ValueError
            return said
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            raise Refused(
                "W601",
                f"a ticket whose details cannot be read ({type(error).__name__})",
                "details of this version",
                "install the same version of fedtune on both sides",
            ) from None


def understood(details: Details, verb: str) -> Recipe:
    """A ticket's recipe. Raises Refused (W602) for one that asks for what this version does not have."""
    try:
        recipe = Recipe.model_validate_json(details.recipe)
        known = verbs_of(recipe)
    except ValidationError as error:
        place = ".".join(str(part) for part in error.errors(include_url=False)[0]["loc"])[:80]
        raise Refused(
            "W602", f"a recipe whose '{place}' this version cannot read", "settings of this version", UPDATE
        ) from None
    if verb not in known:
        raise Refused(
            "W602", f"the verb '{verb}'", f"one of {', '.join(sorted({*map(root_of, known)}))}", UPDATE
        )
    return recipe

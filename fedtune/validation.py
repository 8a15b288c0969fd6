"""What pydantic found wrong with a recipe, as one sentence with a code: the path of the key, the keys that
would do, a near miss."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Sequence
from types import UnionType
from typing import Union, get_origin

from pydantic import BaseModel, ValidationError

from fedtune.errors import FedtuneError
from fedtune.settings import leaves, tag_of


def sentence(error: ValidationError, root: type[BaseModel]) -> FedtuneError:
    """The first mistake of a validation as one sentence."""
    errors = error.errors(include_url=False)
    first = min(errors, key=lambda e: e["type"] != "extra_forbidden")
    place, owner, siblings = resolve(first["loc"], root)
    if first["type"] == "extra_forbidden":
        return unknown_key(place, str(first["loc"][-1]), owner, siblings, root)
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
    words = dict.fromkeys(in_words(e["msg"]) for e in errors if resolve(e["loc"], root)[0] == place)
    return FedtuneError(
        "C102", f"{place} = {value[:80]}", " or ".join(words), f"change {place} in the recipe or with --set"
    )


def in_words(message: str) -> str:
    """What pydantic expected, to stand behind "expected"."""
    words = message[0].lower() + message[1:]
    for begins, better in PYDANTIC.items():
        words = re.sub(f"^{begins}", better, words)
    return words


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
    place: str,
    key: str,
    owner: type[BaseModel] | None,
    siblings: Sequence[type[BaseModel]],
    root: type[BaseModel],
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
    homes = sorted(home for home in places_of(key, root) if home != place)
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


def resolve(
    loc: tuple[int | str, ...], root: type[BaseModel]
) -> tuple[str, type[BaseModel] | None, Sequence[type[BaseModel]]]:
    """A pydantic location as a dotted recipe path, the settings class that holds its last key, and the
    classes of the union that this one is of."""
    words: list[str] = []
    options: list[type[BaseModel]] = [root]
    siblings: list[type[BaseModel]] = []
    holder: type[BaseModel] | None = None
    several = False  # whether the last key may be of several plain types: pydantic adds the one it tried
    for part in loc:
        if several and isinstance(part, str):
            several = False
            continue
        tagged = [c for c in options if part in tag_of(c)[1]]
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
            several = not options and get_origin(field.annotation if field else None) in (Union, UnionType)
    return ".".join(words), holder, siblings

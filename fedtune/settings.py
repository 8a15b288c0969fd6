"""The base of every settings class: frozen, strict, no unknown keys. Settings stand next to what they
configure."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from textwrap import dedent
from typing import Annotated, Any, ClassVar, Literal, Self, get_args, get_origin

from pydantic import BaseModel, ConfigDict

DISCRIMINATORS = (
    "type",
    "step",
    "rule",
    "optimizer",
    "kind",
    "by",
    "source",
    "sink",
    "metric",
    "loss",
    "input",
)  # keys that choose the class of a table


class Settings(BaseModel):
    """One table of a recipe. Fields' docstrings become docs/recipe.md and the schema's descriptions; they are
    read when somebody asks (`descriptions`), because to read them all takes half of an import's time."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, defer_build=True)

    selector: ClassVar[str] = ""  # the key whose value leaves others without effect

    @classmethod
    def unused(cls, table: Mapping[str, Any]) -> set[str]:
        """Keys that the value of `selector` leaves without effect: they go where an override sets it, and are
        refused where a recipe says them."""
        return set()

    def located(self, place: Path) -> Self:
        """The table with its relative paths counted from a folder."""
        return self

    def conflicts(self, recipe: Any) -> Iterator[tuple[str, str, str]]:
        """Settings that cannot go together, each as found, expected, what to do: the recipe is refused (C104)
        with the first."""
        yield from ()


def descriptions(cls: type[BaseModel]) -> dict[str, str]:
    """The docstring below each field of a settings class, of its bases too; none where there is no source."""
    found: dict[str, str] = {}
    for one in reversed(cls.__mro__):
        if issubclass(one, BaseModel) and one is not BaseModel:
            with suppress(OSError, TypeError):  # a class of a notebook, or of no file
                found |= documented(inspect.getsource(one))
    return {name: found[name] for name in cls.model_fields if name in found}


def documented(source: str) -> dict[str, str]:
    """Annotated names of a class's source with the string that stands below each."""
    (body,) = [node.body for node in ast.parse(dedent(source)).body if isinstance(node, ast.ClassDef)]
    return {
        field.target.id: inspect.cleandoc(below.value.value)
        for field, below in pairwise(body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(below, ast.Expr)
        and isinstance(below.value, ast.Constant)
        and isinstance(below.value.value, str)
    }


@dataclass(frozen=True)
class Union:
    """A table whose discriminator says which class reads it: the union is the registry of those classes."""

    discriminator: str
    classes: dict[str, type[Settings]]
    default: str  # "" where the table has to say it


def path_below(place: Path, path: str) -> str:
    """A path from `place`; an absolute one, one from the home folder and none at all stay."""
    return str(place / path) if path and not path.startswith("~") else path


def union_of(cls: type[BaseModel], key: str) -> Union | None:
    """The discriminated union that a field is, or None."""
    field = cls.model_fields.get(key)
    if field is None or not isinstance(field.discriminator, str):
        return None
    default = field.get_default(call_default_factory=True) if not field.is_required() else None
    classes = classes_by_tag(field.annotation, field.discriminator)
    return Union(field.discriminator, classes, str(getattr(default, field.discriminator, "")))


def classes_by_tag(union: Any, discriminator: str) -> dict[str, Any]:
    """The classes of a discriminated union, by the value of their discriminator, in the order of the
    union."""
    members = get_args(get_args(union)[0]) if get_origin(union) is Annotated else get_args(union)
    return {
        tag: cls
        for cls in members or (union,)
        for tag in get_args(cls.model_fields[discriminator].annotation)
    }


def tag_of(cls: type[BaseModel]) -> tuple[str, tuple[str, ...]]:
    """The discriminator of a union's member and its values; ("", ()) for a class that stands in no union."""
    for name, field in cls.model_fields.items():
        if get_origin(field.annotation) is Literal and (name in DISCRIMINATORS):
            return name, get_args(field.annotation)
    return "", ()


def leaves(annotation: Any) -> list[Any]:
    """All plain types inside an annotation."""
    inner = get_args(annotation)
    return [leaf for part in inner for leaf in leaves(part)] if inner else [annotation]

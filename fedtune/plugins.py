"""Classes that other installed packages add: their own methods, rules, steps, adapters, sources, partitions,
sinks, metrics, by the name that a recipe says.

A package registers the settings class of its newcomer as an entry point, under the newcomer's name:

    [project.entry-points."fedtune.rules"]
    geometric-median = "my_package:GeometricMedian"

From then on it stands in the union like fedtune's own. Only what is installed where a recipe is read counts:
nothing of it ever travels.
"""

from __future__ import annotations

from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Annotated, Any, NoReturn, get_args

from pydantic import Field

from fedtune.errors import FedtuneError
from fedtune.settings import Settings, classes_by_tag

GROUPS = (
    "methods",
    "rules",
    "steps",
    "adapters",
    "objectives",
    "input_changes",
    "sources",
    "partitions",
    "selections",
    "downlinks",
    "server_optimizers",
    "sinks",
    "metrics",
)


@cache
def installed() -> dict[str, list[EntryPoint]]:
    """Entry points of all installed packages, by group."""
    found = entry_points()
    return {
        group: sorted(found.select(group=f"fedtune.{group}"), key=lambda entry: entry.name)
        for group in GROUPS
    }


def extended(union: Any, discriminator: str, group: str, base: type[Settings]) -> Any:
    """The union with the classes of installed packages behind fedtune's own. Raises C106."""
    known = classes_by_tag(union, discriminator)
    more: list[type[Settings]] = []
    for entry in installed()[group]:
        cls = loaded(entry, group, discriminator, base)
        if entry.name in known:
            refuse(entry, group, f"the name '{entry.name}', which is taken", "a name of its own")
        known[entry.name] = cls
        more.append(cls)
    if not more:
        return union
    members = (*get_args(get_args(union)[0]), *more)
    whole: Any = members[0]
    for cls in members[1:]:
        whole = whole | cls
    return Annotated[whole, Field(discriminator=discriminator)]


def loaded(entry: EntryPoint, group: str, discriminator: str, base: type[Settings]) -> type[Settings]:
    """The class that an entry point names. Raises C106 where it cannot be imported, or is of another sort."""
    try:
        cls = entry.load()
    except Exception as error:  # another package's import may raise anything
        refuse(entry, group, f"{type(error).__name__}: {str(error)[:160]}", "a class that can be imported")
    if not (isinstance(cls, type) and issubclass(cls, base)):
        refuse(entry, group, f"{entry.value}", f"a subclass of {base.__module__}.{base.__qualname__}")
    field = cls.model_fields.get(discriminator)
    if field is None or get_args(field.annotation) != (entry.name,):
        refuse(
            entry,
            group,
            f"{entry.value}, whose {discriminator} is not Literal['{entry.name}']",
            "the entry point's own name",
        )
    return cls


def refuse(entry: EntryPoint, group: str, found: str, expected: str) -> NoReturn:
    package = entry.dist.name if entry.dist else "an installed package"
    raise FedtuneError(
        "C106",
        f"{found}, in plug-in '{entry.name}' (fedtune.{group}) of {package}",
        expected,
        f"fix or uninstall {package}",
    )

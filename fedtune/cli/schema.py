"""fedtune schema: the keys of a recipe as a JSON Schema, by which editors complete, explain and check it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

DRAFT = "http://json-schema.org/draft-07/schema#"  # the newest one that TOML editors read throughout
HEADER = "#:schema"  # a comment of this form at a TOML file's head names its schema (Taplo, Even Better TOML)
SCHEMA = "recipe.schema.json"  # the name that fedtune init looks for beside a recipe


def add_commands(commands: Any) -> None:
    parser = commands.add_parser(
        "schema", help="write a JSON Schema of recipes, for editors that read TOML", description=__doc__
    )
    parser.add_argument(
        "--to",
        default="",
        metavar="FILE",
        help=f"a .json file; name it in a recipe's first line, such as '{HEADER} {SCHEMA}'",
    )
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    from fedtune.disk import write_atomic

    if not options.to:
        print(schema_text(), end="")
        return 0
    target = Path(options.to).expanduser()
    write_atomic(target, schema_text().encode())
    print(f"{target}; the first line of a recipe beside it: {HEADER} {target.name}")
    return 0


def schema_text() -> str:
    return json.dumps(recipe_schema(), indent=1, ensure_ascii=False) + "\n"


def recipe_schema() -> dict[str, Any]:
    """The JSON Schema of a recipe, of the classes that installed packages add, too. What it accepts has known
    keys and values of the right type; conflicts between settings are for `fedtune check` to find."""
    from pydantic.json_schema import GenerateJsonSchema

    from fedtune.config import Recipe
    from fedtune.settings import descriptions

    class Described(GenerateJsonSchema):
        def model_schema(self, schema: Any) -> dict[str, Any]:
            made = super().model_schema(schema)
            for name, text in descriptions(schema["cls"]).items():
                made["properties"][name]["description"] = text
            return made

    known = {"$schema": DRAFT, **Recipe.model_json_schema(schema_generator=Described)}
    return {**simplified(known), "title": "fedtune recipe"}


def simplified(node: Any) -> Any:
    """A schema whose unions can do without their discriminator, as recipes may, and without what only
    programs read."""
    if isinstance(node, list):
        return [simplified(one) for one in node]
    if not isinstance(node, dict):
        return node
    made = {key: value for key, value in node.items() if not is_noise(key, value)}
    if "discriminator" in made:
        made |= {"anyOf": options_of(made.pop("discriminator"), node.get("default"))}
        del made["oneOf"]
    return {
        key: {name: simplified(one) for name, one in value.items()}
        if key in ("properties", "$defs")
        else simplified(value)
        for key, value in made.items()
    }


def is_noise(key: str, value: Any) -> bool:
    """Titles that repeat their key, and defaults of whole tables, which stand at their keys."""
    return (key == "title" and isinstance(value, str)) or (
        key == "default" and isinstance(value, dict | list)
    )


def options_of(discriminator: dict[str, Any], default: Any) -> list[dict[str, Any]]:
    """The classes of a union: each has to be named, but for the default's."""
    tag = discriminator["propertyName"]
    usual = default.get(tag) if isinstance(default, dict) else None
    places: dict[str, list[str]] = {}  # a class may have several names
    for value, place in discriminator["mapping"].items():
        places.setdefault(place, []).append(value)
    return [
        {"$ref": place} if usual in names else {"allOf": [{"$ref": place}], "required": [tag]}
        for place, names in places.items()
    ]

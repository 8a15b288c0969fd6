"""docs/architecture.md: its tables of packages and of libraries, from the imports that are there and the floors that
.importlinter enforces."""

from __future__ import annotations

import ast
import configparser
from collections.abc import Iterator
from pathlib import Path

import grimp

from tests.regen.docs import cell
from tests.regen.results import block

ROOT = Path(__file__).resolve().parents[2]
LIBRARIES = ("flwr", "torch", "transformers", "peft", "grpc", "numba", "triton")
Graph = dict[str, set[str]]


def generate() -> dict[str, str]:
    path = "docs/architecture.md"
    text = (ROOT / path).read_text(encoding="utf-8")
    floors, ground = layers()
    graph = grimp.build_graph(
        "fedtune", include_external_packages=True, exclude_type_checking_imports=True, cache_dir=None
    )
    rooms = between_rooms(graph)
    text = block(text, "rooms", "\n".join(table(floors, ground, rooms)))
    return {path: block(text, "libraries", "\n".join(users(graph)))}


def layers() -> tuple[list[list[str]], list[str]]:
    """Rooms by floor, the highest first; and what stands on the ground."""
    parser = configparser.ConfigParser()
    parser.read(ROOT / ".importlinter")
    lines = parser["importlinter:contract:floors"]["layers"].split("\n")
    *floors, ground = [
        [word.strip() for word in line.replace("|", ":").split(":")] for line in lines if line.strip()
    ]
    return floors, ground


def room(module: str) -> str:
    """`runtime` of fedtune.runtime.run; "" for fedtune itself and for other packages."""
    first, _, rest = module.partition(".")
    return rest.partition(".")[0] if first == "fedtune" else ""


def between_rooms(graph: grimp.ImportGraph) -> Graph:
    found: Graph = {}
    for module in graph.modules:
        for other in graph.find_modules_directly_imported_by(module):
            if room(module) and room(other) and room(module) != room(other):
                found.setdefault(room(module), set()).add(room(other))
    return found


def table(floors: list[list[str]], ground: list[str], rooms: Graph) -> Iterator[str]:
    yield from ("| floor | package | what it is | imports |", "|---|---|---|---|")
    for number, names in zip(range(len(floors), 0, -1), floors, strict=True):
        for name in names:
            below = ", ".join(sorted(rooms.get(name, set()) - set(ground)))
            yield f"| {number} | `{name}` | {cell(about(name))} | {below} |"
    yield f"| 0 | {', '.join(f'`{name}`' for name in sorted(ground))} | what all others use | |"


def about(name: str) -> str:
    """The first sentence of a package's or a file's docstring."""
    place = ROOT / "fedtune" / name
    file = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
    text = (
        (ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "")
        .partition("\n\n")[0]
        .replace("\n", " ")
    )
    return text.partition(". ")[0].rstrip(".")


def users(graph: grimp.ImportGraph) -> Iterator[str]:
    """Where the large libraries are imported: by package, or by file where there are few."""
    yield from ("| library | imported by |", "|---|---|")
    for library in LIBRARIES:
        files = sorted(graph.find_modules_that_directly_import(library)) if library in graph.modules else []
        names = files if len(files) <= 6 else sorted({room(file) for file in files})
        listed = ", ".join(f"`{name.removeprefix('fedtune.')}`" for name in names)
        yield f"| {library} | {listed} |"

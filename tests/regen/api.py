"""docs/api.md: the Python API, from the signatures and docstrings of fedtune/api.py and fedtune/events.py."""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

from tests.regen.docs import NOTE, cell

ROOT = Path(__file__).resolve().parents[2]
ABOUT = """# Python API

`import fedtune` is light: it loads neither torch nor Flower, which come with the first call that needs them. Everything here does what the
[command](cli.md) of the same name does, prints nothing unless it says so, and raises `fedtune.FedtuneError` where the command would print a
sentence: `error.code` is one of the [codes](errors.md), `str(error)` the sentence. `~` in a path is the home folder.
"""
EVENTS = """## Events

What `on_event` is told, what `stream` yields, and what a run's `events.jsonl` and [sinks](extending.md#a-sink) hold: frozen dataclasses
of `fedtune.events`, each with `at`, the seconds since the epoch. `event.record()` is one as a flat dict.

| event | fields | |
|---|---|---|
"""


def generate() -> dict[str, str]:
    from fedtune import API

    tree = parsed("fedtune/api.py")
    found = {node.name: node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    lines = [NOTE, ABOUT, "| | |", "|---|---|"]
    for name in sorted(API, key=str.lower):
        said = (ast.get_docstring(found[name]) or "").partition("\n\n")[0]
        lines.append(f"| [`{name}`](#fedtune{name.lower()}) | {cell(first_sentence(said))} |")
    for name in sorted(API, key=str.lower):
        lines += ["", f"## `fedtune.{name}`", ""]
        node = found[name]
        if isinstance(node, ast.FunctionDef):
            lines += ["```text", *signature(node), "```", ""]
        lines += body(ast.get_docstring(node) or "")
        if isinstance(node, ast.ClassDef):
            lines += ["", "| attribute | type |", "|---|---|", *attributes(node)]
    lines += ["", EVENTS + "\n".join(events()), ""]
    return {"docs/api.md": re.sub(r"\n{3,}", "\n\n", "\n".join(lines))}


def parsed(path: str) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"))


def first_sentence(text: str) -> str:
    return re.split(r"(?<=[.;])\s|:\s", text.replace("\n", " "), maxsplit=1)[0].rstrip(".;") + "."


def signature(node: ast.FunctionDef) -> list[str]:
    """One line where it fits, else one for each parameter."""
    args, result = node.args, ast.unparse(node.returns) if node.returns else "None"
    plain = [*args.posonlyargs, *args.args]
    defaults = [None] * (len(plain) - len(args.defaults)) + list(args.defaults)
    words = [worded(arg, value) for arg, value in zip(plain, defaults, strict=True)]
    if args.posonlyargs:
        words.insert(len(args.posonlyargs), "/")
    if args.kwonlyargs:
        words.append("*")
    words += [worded(arg, value) for arg, value in zip(args.kwonlyargs, args.kw_defaults, strict=True)]
    words += [f"**{worded(args.kwarg, None)}"] if args.kwarg else []
    one = f"fedtune.{node.name}({', '.join(words)}) -> {result}"
    return (
        [one]
        if len(one) <= 100
        else [f"fedtune.{node.name}(", *(f"    {w}," for w in words), f") -> {result}"]
    )


def worded(arg: ast.arg, default: ast.expr | None) -> str:
    kind = f": {ast.unparse(arg.annotation)}" if arg.annotation else ""
    return f"{arg.arg}{kind}" + (f" = {ast.unparse(default)}" if default else "")


def body(docstring: str) -> Iterator[str]:
    """Paragraphs as they are; lists of parameters as a table; code as code."""
    for paragraph in docstring.split("\n\n"):
        rows = parameters(paragraph)
        if rows:
            yield from ("| parameter | |", "|---|---|")
            yield from (f"| `{'`, `'.join(name.split(', '))}` | {cell(said)} |" for name, said in rows)
        elif is_code(paragraph):
            yield from (
                "```python",
                *(["import fedtune", ""]),
                *textwrap.dedent(paragraph).split("\n"),
                "```",
            )
        else:
            yield paragraph
        yield ""


def parameters(paragraph: str) -> list[tuple[str, str]]:
    """Names and texts of `name   text` lines, whose further lines are indented."""
    rows: list[tuple[str, str]] = []
    for line in paragraph.split("\n"):
        if found := re.match(r"(\w+(?:, \w+)*)(?: {2,}| (?=of |keys ))(.+)$", line):
            rows.append((found[1], found[2]))
        elif rows and line.startswith("  "):
            rows[-1] = (rows[-1][0], f"{rows[-1][1]} {line.strip()}")
        else:
            return []
    return rows


def is_code(paragraph: str) -> bool:
    try:
        return "\n" in paragraph and bool(ast.parse(textwrap.dedent(paragraph)))
    except SyntaxError:
        return False


def attributes(node: ast.ClassDef) -> Iterator[str]:
    for line in node.body:
        if isinstance(line, ast.AnnAssign):
            yield f"| `{ast.unparse(line.target)}` | `{ast.unparse(line.annotation)}` |"


def events() -> Iterator[str]:
    for node in parsed("fedtune/events.py").body:
        if (
            isinstance(node, ast.ClassDef)
            and node.name != "Event"
            and "Event" in map(ast.unparse, node.bases)
        ):
            fields = ", ".join(
                f"`{ast.unparse(one.target)}`" for one in node.body if isinstance(one, ast.AnnAssign)
            )
            said = (ast.get_docstring(node) or "").partition("\n\n")[0]
            yield f"| `{node.name}` | {fields} | {cell(said)} |"

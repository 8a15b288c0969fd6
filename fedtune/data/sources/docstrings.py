"""The built-in data: docstrings of packages that every installation has, labelled by package.

The files are parsed, never imported. A row is a docstring's first paragraph without markup; whatever names a
package is
masked, so that a classifier must know what the packages are about. The rows depend on the installed versions
only.
"""

from __future__ import annotations

import ast
import os
import re
import warnings
from collections.abc import Iterator
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from fedtune.data.rows import Table
from fedtune.data.settings import Source
from fedtune.errors import FedtuneError
from fedtune.forks import Forks
from fedtune.rng import stream
from fedtune.threads import available_cores

Package = Literal[
    "fontTools",
    "matplotlib",
    "networkx",
    "numpy",
    "pandas",
    "prompt_toolkit",
    "sqlalchemy",
    "sympy",
    "torch",
    "transformers",
]
PACKAGES: dict[Package, tuple[str, ...]] = {
    # package (a dependency of fedtune or of its dependencies) -> other names by which texts call it, as whole
    # words
    "fontTools": ("font tools", "ttlib", "ttx"),
    "matplotlib": ("mpl", "plt", "pyplot", "pylab"),
    "networkx": ("nx",),
    "numpy": ("np",),
    "pandas": ("pd",),
    "prompt_toolkit": ("prompt toolkit", "ptk"),
    "sqlalchemy": ("sqla",),
    "sympy": ("isympy",),
    "torch": ("aten", "nn"),
    "transformers": ("transformer", "hugging face", "huggingface", "hf", "tf"),
}
PER_PACKAGE = 450  # rows, unless told otherwise; ten packages make 4,500 in the time that parsing 12 MB takes
SHARED = 10  # so many more of each are read, for those that an earlier package has too
MIN_WORDS = 5
SKIPPED = {"tests", "test", "testing", "_vendor", "__pycache__"}
MASK = "library"

ALIASES = [alias for aliases in PACKAGES.values() for alias in aliases]
# a package's name inside any longer name or dotted path ("torch.nn.Module", "PyTorch", "numpydoc"), or
# another name as a word
NAMES = re.compile(
    rf"[\w.\-]*(?:{'|'.join(PACKAGES)})(?:[\w.\-]*\w)?|\b(?:{'|'.join(ALIASES)})\b(?:\.\w+)*",
    re.IGNORECASE,
)
SECTION = re.compile(
    r"\n\s*(?:Args?|Arguments|Parameters|Returns?|Raises|Yields|Notes?|Examples?)\s*:?\s*(?:\n.*)?\Z",
    re.DOTALL,
)  # not parted by a blank line
WORD = re.compile(r"[A-Za-z]{2}")
MARKUP: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), into)
    for pattern, into in (
        (r">>>[\s\S]*", ""),  # a doctest and all that follows
        (r"`([^`<]*?)\s*<[^`>]*>`_*", r"\1"),  # `text <target>`_
        (r":[\w:+-]+:`~?([^`]*)`", r"\1"),  # :class:`~a.B`
        (r"\[([^\]]*)\]\([^)]*\)", r"\1"),  # [text](target)
        (r"https?://\S+", ""),
        (r"[`*|]+", ""),
        (r"\s+", " "),
    )
)


class Docstrings(Source):
    """source = "docstrings": built in, needs no file; columns text and label."""

    source: Literal["docstrings"] = "docstrings"
    tasks: ClassVar[frozenset[str]] = frozenset({"classify", "causal-lm"})
    packages: tuple[Package, ...] = Field(tuple(PACKAGES), min_length=1)
    """Packages whose docstrings are read; each is a class."""
    per_package: int = Field(PER_PACKAGE, ge=1)
    """Docstrings of each, as far as it has so many."""

    def begin(self) -> bool:
        reading(self.packages, self.per_package)
        return True

    def table(self) -> Table:
        """The same rows in every process. Raises D208 (a package is not installed)."""
        rows = collect(self.packages, self.per_package)
        return Table(
            [{self.text: text, self.label: label} for text, label in rows], "the built-in docstrings"
        )


@cache
def reading(packages: tuple[Package, ...], count: int) -> Forks:
    """The packages, being read: by forks, where this machine has cores for them."""
    return Forks([partial(texts_of, package, count + SHARED) for package in packages], available_cores())


@cache
def collect(
    packages: tuple[Package, ...] = tuple(PACKAGES), count: int = PER_PACKAGE
) -> tuple[tuple[str, str], ...]:
    """(text, package) by package, `count` of each; a text that two packages share stays with the first."""
    read = dict(reading(packages, count).results())
    seen: set[str] = set()
    pairs: list[tuple[str, str]] = []
    for number, package in enumerate(packages):
        most = count + SHARED
        while (
            len(fresh := [text for text in read[number] if text.lower() not in seen]) < count
            and len(read[number]) == most
        ):
            most *= 2
            read[number] = texts_of(package, most)
        seen |= {text.lower() for text in fresh[:count]}
        pairs += [(text, package) for text in fresh[:count]]
    return tuple(pairs)


def texts_of(package: Package, most: int) -> list[str]:
    """The first texts of a package that differ from one another."""
    texts: dict[str, str] = {}
    for paragraph in paragraphs(package, list(PACKAGES).index(package)):
        text = cleaned(paragraph)
        words = [word for word in text.split() if WORD.search(word) and MASK not in word]
        if len(words) >= MIN_WORDS:
            texts.setdefault(text.lower(), text)
            if len(texts) == most:
                break
    return list(texts.values())


def paragraphs(package: str, number: int) -> Iterator[str]:
    """First paragraphs of a package's docstrings: a sample of the whole package, read only as far as
    needed. Raises D208."""
    for tree in trees(package, number):
        for _, docstring in documented(tree):
            yield docstring.split("\n\n", 1)[0]


def trees(package: str, number: int) -> Iterator[ast.Module]:
    """A package's files, parsed, in a random order that `number` fixes. Raises D208."""
    spec = find_spec(package)  # finds a top-level package without importing it
    if spec is None or not spec.submodule_search_locations:
        raise FedtuneError(
            "D208",
            sentence=f"the built-in data is made from the package '{package}', which is not installed",
            do=f"run: pip install {package}",
        )
    root = Path(next(iter(spec.submodule_search_locations)))
    files = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in SKIPPED]
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    files.sort(key=lambda path: path.relative_to(root).as_posix())
    for index in stream("docstrings", number).permutation(len(files)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's strings
            try:
                tree = ast.parse(files[index].read_bytes())
            except (SyntaxError, ValueError):  # templates, or syntax of another Python: no source of text
                continue
        yield tree


def documented(node: ast.Module | ast.ClassDef, inside: str = "") -> Iterator[tuple[str, str]]:
    """Names and docstrings of a module's classes, their methods and its functions, in the order of the
    file."""
    for child in node.body:
        if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            docstring = ast.get_docstring(child)
            if docstring:
                yield inside + child.name, docstring
        if isinstance(child, ast.ClassDef):
            yield from documented(child, f"{inside}{child.name}.")


def cleaned(paragraph: str) -> str:
    """As `prose`, packages masked."""
    return NAMES.sub(MASK, prose(paragraph)).strip()


def prose(paragraph: str) -> str:
    """Text on one line, without markup; "" for what is a directive rather than prose."""
    if paragraph.lstrip().startswith((".. ", ">>>")):
        return ""
    paragraph = SECTION.sub("", paragraph)
    for pattern, into in MARKUP:
        paragraph = pattern.sub(into, paragraph)
    return paragraph.strip()

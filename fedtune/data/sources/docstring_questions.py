"""Built-in questions and answers: what a class or function is for, asked of packages that every installation
has, answered by the first paragraph of its docstring. For preference tuning, that answer is the better one,
and the worse one is what another class or function of the package is for, or half of the answer.

Files are parsed, never imported; the rows depend on the installed versions only."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

from pydantic import Field

from fedtune.data.rows import Table
from fedtune.data.settings import Source
from fedtune.data.sources.docstrings import PACKAGES, documented, prose, trees

FEWEST, MOST = 4, 40  # words of an answer


class DocstringQuestions(Source):
    """source = "docstring-questions": built in, needs no file; columns prompt, response (or chosen and
    rejected) and package."""

    source: Literal["docstring-questions"] = "docstring-questions"
    tasks: ClassVar[frozenset[str]] = frozenset({"instruct", "preference"})
    packages: tuple[str, ...] = Field(("networkx", "sympy", "pandas", "matplotlib"), min_length=1)
    """Packages that are asked about; unlike kinds of questions make unlike clients."""
    per_package: int = Field(150, ge=1)
    """Questions about each."""

    def table(self) -> Table:
        """Raises D208 (a package is not installed)."""
        rows = [
            {self.prompt or "prompt": asked, **answer, "package": package}
            for package in self.packages
            for asked, answer in self.answered(package)
        ]
        return Table(rows, "the built-in questions about docstrings")

    def answered(self, package: str) -> Iterator[tuple[str, dict[str, str]]]:
        """Questions of a package, each with its answer, or with a better and a worse one."""
        found = list(questions(package, self.per_package))
        for number, (asked, answer) in enumerate(found):
            if self.task != "preference":
                yield asked, {self.response: answer}
                continue
            other = found[(number + 1) % len(found)][1]
            yield asked, {self.chosen: answer, self.rejected: half(answer) if number % 2 else other}


def questions(package: str, most: int) -> Iterator[tuple[str, str]]:
    """The first questions of a package whose answers differ, in the order of its files. Raises D208."""
    number = list(PACKAGES).index(package) if package in PACKAGES else len(PACKAGES)
    seen: set[str] = set()
    for tree in trees(package, number):
        for name, docstring in documented(tree):
            answer = prose(docstring.split("\n\n", 1)[0])
            key = answer.lower()
            if key in seen or not FEWEST <= len(answer.split()) <= MOST or is_private(name):
                continue
            seen.add(key)
            yield f"What is `{name}` in {package} for?", answer
            if len(seen) == most:
                return


def half(answer: str) -> str:
    """
    >>> half("Return the number of edges")
    'Return the'
    """
    words = answer.split()
    return " ".join(words[: len(words) // 2])


def is_private(name: str) -> bool:
    """
    >>> is_private("Graph.add_edge"), is_private("Graph._add"), is_private("test_edges")
    (False, True, True)
    """
    return any(part.startswith(("_", "test")) for part in name.split("."))

"""The built-in data: enough of it, balanced, no label in its own text, and the same in every process."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from collections import Counter

import pytest

from fedtune.data.sources.docstrings import MASK, PACKAGES, PER_PACKAGE, cleaned, collect, paragraphs
from fedtune.errors import FedtuneError
from tests.marks import mostly_thorough
from tests.waiting import PATIENCE

PROBE = """
import hashlib, sys
from fedtune.data.sources.docstrings import PACKAGES, collect
rows = collect()
print(hashlib.sha256(repr(rows).encode()).hexdigest(), [p for p in PACKAGES if p in sys.modules and p != "numpy"])
"""


def words(names: list[str]) -> re.Pattern[str]:
    return re.compile(r"(?<!\w)(?:" + "|".join(map(re.escape, names)) + r")(?!\w)", re.IGNORECASE)


@pytest.mark.thorough
def test_there_is_enough_and_it_is_balanced() -> None:
    counts = Counter(label for _, label in collect())
    assert len(counts) >= 8
    assert sum(counts.values()) >= 4000
    assert max(counts.values()) <= 1.25 * min(counts.values())


@pytest.mark.thorough
def test_some_packages_have_the_rows_that_they_have_among_all() -> None:
    some = collect(("sympy", "pandas"), 20)
    assert Counter(label for _, label in some) == {"sympy": 20, "pandas": 20}
    assert [label for _, label in some][:20] == ["sympy"] * 20
    assert set(some) <= set(collect())


COUNTS = pytest.mark.parametrize("count", mostly_thorough([40, PER_PACKAGE], [40]))


@COUNTS
def test_no_row_names_its_own_package(count: int) -> None:
    rows = collect(count=count)
    variants = {"torch": ["pytorch", "torch.nn"], "numpy": ["numpy.ndarray"], "pandas": ["pandas.DataFrame"]}
    own = {
        package: words([package, *aliases, *variants.get(package, [])])
        for package, aliases in PACKAGES.items()
    }
    assert own["numpy"].search("an np.array") and own["torch"].search(
        "In PyTorch, a tensor"
    )  # the probe itself can fail
    assert [(text, label) for text, label in rows if own[label].search(text)] == []
    assert [
        text for text, _ in rows if any(p.lower() in text.lower() for p in PACKAGES)
    ] == []  # nor any package, even inside a longer name


@COUNTS
def test_texts_are_prose_and_each_stands_once(count: int) -> None:
    texts = [text for text, _ in collect(count=count)]
    assert len({text.lower() for text in texts}) == len(texts)
    assert all(text == " ".join(text.split()) and "`" not in text and ">>>" not in text for text in texts)
    assert min(len(text.split()) for text in texts) >= 5


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (
            "Return a :class:`~torch.Tensor` like\n    ``np.array`` does.",
            f"Return a {MASK} like {MASK} does.",
        ),
        ("See `the guide <https://x.org/a>`_ of PyTorch's team", f"See the guide of {MASK}'s team"),
        ("Draws with plt.plot on pandas data. >>> import pandas", f"Draws with {MASK} on {MASK} data."),
        ("Arrays, not npz files; pd is short.", f"Arrays, not npz files; {MASK} is short."),
        ("Sum of two numbers.\nArgs:\n  a: one\n  b: two", "Sum of two numbers."),
        (".. deprecated:: 1.2", ""),
    ],
)
def test_cleaning(raw: str, expected: str) -> None:
    assert cleaned(raw) == expected


@pytest.mark.thorough
def test_another_process_agrees_and_imports_nothing() -> None:
    said = subprocess.run(
        [sys.executable, "-c", PROBE],
        env={**os.environ, "PYTHONHASHSEED": "1"},
        check=True,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    ).stdout.strip()
    assert said == hashlib.sha256(repr(collect()).encode()).hexdigest() + " []"


def test_a_package_that_is_missing_is_named() -> None:
    with pytest.raises(FedtuneError, match="no_such_package_here") as caught:
        next(paragraphs("no_such_package_here", 0))
    assert caught.value.code == "D208"

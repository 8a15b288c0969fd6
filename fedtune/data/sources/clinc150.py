"""CLINC150 (Larson et al. 2019, arXiv 1909.02027): 150 intents in 10 domains, from its own two files.

data_full.json maps a split to [text, intent] pairs; domains.json maps a domain to its intents. Columns: text,
label (the
intent), domain. The official test split is the test set; validation and out-of-scope rows are counted and
left out.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar, Literal

from fedtune.data.rows import Rows, Table
from fedtune.data.settings import PathSource
from fedtune.data.sources.files import existing
from fedtune.errors import FedtuneError


class Clinc150(PathSource):
    """source = "clinc150": CLINC150's folder; columns text, label, domain, and the official test set."""

    source: Literal["clinc150"] = "clinc150"
    tasks: ClassVar[frozenset[str]] = frozenset({"classify", "causal-lm"})
    has_test: ClassVar[bool] = True

    def table(self) -> Table:
        """Raises D201 (a file is missing) and D203 (a file is not what it should be)."""
        folder = existing(self)
        splits, domains = (loaded(folder / name) for name in ("data_full.json", "domains.json"))
        try:
            domain_of = {intent: domain for domain, intents in domains.items() for intent in intents}
            train, test = (rows(splits[name], domain_of) for name in ("train", "test"))
            outside = sum(len(pairs) for name, pairs in splits.items() if name.startswith("oos"))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise FedtuneError(
                "D203",
                f"{type(error).__name__} {error} in '{folder}'",
                "matching data_full.json and domains.json of CLINC150",
                "download both files again",
            ) from error
        counts = {"out of scope (all splits)": outside, "validation split": len(splits.get("val", ()))}
        return Table(train, str(folder), test, {reason: count for reason, count in counts.items() if count})


def rows(pairs: list[list[str]], domain_of: dict[str, str]) -> Rows:
    return [{"text": text, "label": intent, "domain": domain_of[intent]} for text, intent in pairs]


def loaded(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise FedtuneError(
            "D201",
            f"nothing at '{path}'",
            "a folder with data_full.json and domains.json",
            "correct data.path",
        ) from None
    except NotADirectoryError:
        raise FedtuneError(
            "D201",
            f"'{path.parent}', which is not a folder",
            "a folder with data_full.json and domains.json",
            "correct data.path",
        ) from None
    except ValueError as error:
        raise FedtuneError("D203", f"'{path}' ({error})", "a JSON file", "download the file again") from error
    if not isinstance(content, dict):
        raise FedtuneError(
            "D203", f"{type(content).__name__} in '{path}'", "a JSON object", "download the file again"
        )
    return content

"""Pages of the site that are kept elsewhere in the repository, where people and programs expect them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PAGES = {
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
    "security.md": "SECURITY.md",
    "results.md": "simulations/README.md",
}


def on_files(files: Files, config: Any) -> Files:
    """Add them, with their links as they are seen from docs/."""
    for name, path in PAGES.items():
        text = (ROOT / path).read_text(encoding="utf-8")
        files.append(File.generated(config, name, content=re.sub(r"\]\((\.\./)?docs/", "](", text)))
    return files

"""The packages that fedtune, its real sites and its demo need, a line each, from pyproject.toml in this
folder: for an image's layer that does not change with the code."""

import sys
import tomllib
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
extras = project["optional-dependencies"]
needed = [package for name in ("flower", "zeroth", "parquet", "demo") for package in extras[name]]
sys.stdout.write("\n".join([*project["dependencies"], *needed]) + "\n")

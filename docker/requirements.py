"""The packages that fedtune and its demo need, a line each, from pyproject.toml in this folder: for an
image's layer that does not change with the code."""

import sys
import tomllib
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
sys.stdout.write("\n".join([*project["dependencies"], *project["optional-dependencies"]["demo"]]) + "\n")

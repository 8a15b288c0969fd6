"""The app that is submitted to Flower: two lines that name our doors. It is written for each run, because a wheel holds no Flower project."""

from __future__ import annotations

from pathlib import Path

PROJECT = """[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "fedtune-run"
version = "1.0.0"
license = { file = "LICENSE" }
dependencies = ["flwr>=1.41.0"]

[tool.flwr.app]
publisher = "fedtune"
fab-format-version = 1
flwr-version-target = "1.41.0"
fab-include = ["/fedtune_run/*.py", "/LICENSE"]

[tool.flwr.app.components]
serverapp = "fedtune_run.server:app"
clientapp = "fedtune_run.client:app"

[tool.flwr.app.config]
folder = ""
"""
FILES = {  # Flower reads the modules without importing them, and looks for the assignment
    "pyproject.toml": PROJECT,
    "LICENSE": "Apache-2.0\n",
    "fedtune_run/__init__.py": "",
    "fedtune_run/server.py": "from fedtune.deploy import server_door\n\napp = server_door.app\n",
    "fedtune_run/client.py": "from fedtune.deploy import client_door\n\napp = client_door.app\n",
}


def write_app(folder: Path) -> Path:
    """The project's folder, for `flwr run`."""
    for name, text in FILES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder

"""Flower's app (FAB) of a deployment: two lines that name our doors. It is written where it is run, because a
wheel holds no Flower project.

The coordinator submits it to its own SuperLink. A site never takes one from there: its fleet proxy answers
`get-run` and `get-fab` with what stands here, so
that whatever a coordinator was made to serve, a site runs the code that it has installed.
"""

from __future__ import annotations

import functools
import hashlib
import io
import tomllib
import zipfile
from collections.abc import Mapping
from pathlib import Path

import tomli_w

from fedtune.deploy.protobuf import Field, Shape, Value, number_of, read, write

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


@functools.cache
def bundle() -> bytes:
    """The app as Flower takes it: a zip of the files and of a list of their hashes."""
    files = {
        "pyproject.toml": tomli_w.dumps(tomllib.loads(PROJECT)),
        **{name: text for name, text in sorted(FILES.items()) if name != "pyproject.toml"},
    }
    files[".info/CONTENT"] = "\n".join(
        f"{name},{hashlib.sha256(text.encode()).hexdigest()},{8 * len(text.encode())}"
        for name, text in files.items()
    )
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        for name, text in files.items():
            archive.writestr(zipfile.ZipInfo(name), text)
    return made.getvalue()


# --- a site's own answers to what Flower's SuperNode asks about a run ---

STATUS: Shape = {
    1: Field("status", "text", 32),
    2: Field("sub_status", "text", 32),
    3: Field("details", "bytes", 1024),
}
PAIR: Shape = {1: Field("key", "bytes", 256), 2: Field("value", "bytes", 4096)}
RUN: Shape = {
    1: Field("run_id", "number"),
    2: Field("fab_id", "text", 256),
    3: Field("fab_version", "text", 64),
    4: Field("override_config", "table", 8192, 64, PAIR),
    5: Field("fab_hash", "text", 128),
    **{n: Field(f"time_{n}", "text", 64) for n in (6, 7, 8, 9)},
    10: Field("status", "table", 2048, 1, STATUS),
    11: Field("flwr_aid", "text", 256),
    12: Field("federation", "text", 256),
    13: Field("bytes_sent", "number"),
    14: Field("bytes_recv", "number"),
    15: Field("clientapp_runtime", "double"),
    16: Field("primary_task_type", "text", 64),
    17: Field("primary_task_id", "number"),
    18: Field("series_id", "number"),
    19: Field("account_name", "text", 256),
}
GET_RUN_REPLY: Shape = {1: Field("run", "table", 64 << 10, 1, RUN)}
GET_FAB_REPLY: Shape = {
    1: Field(
        "fab", "table", 1 << 20, 1, {1: Field("hash_str", "text", 64), 2: Field("content", "bytes", 1 << 20)}
    )
}
KEPT = (
    "run_id",
    "time_6",
    "time_7",
    "time_8",
    "status",
    "primary_task_id",
    "series_id",
)  # of what the coordinator says of a run
OWN = {"fab_id": "fedtune/fedtune-run", "fab_version": "1.0.0", "primary_task_type": "flwr-serverapp"}


def own_run(reply: bytes) -> bytes:
    """The answer to `get-run`: the coordinator's numbers, this site's app, no settings. Raises Refused W601,
    W606."""
    said = read(reply, GET_RUN_REPLY)
    run = said["run"][0] if said.get("run") else {}
    kept: dict[str, list[Value]] = (
        {name: list(run[name]) for name in KEPT if name in run} if isinstance(run, Mapping) else {}
    )
    if number_of(said, "run", "run_id"):
        kept.update(
            {
                name: [value]
                for name, value in (*OWN.items(), ("fab_hash", hashlib.sha256(bundle()).hexdigest()))
            }
        )
    return write({"run": [kept]}, GET_RUN_REPLY)


def own_app() -> bytes:
    """The answer to `get-fab`, whatever hash it asks for."""
    return write(
        {"fab": [{"hash_str": [hashlib.sha256(bundle()).hexdigest()], "content": [bundle()]}]}, GET_FAB_REPLY
    )

"""The ServerApp that a deployment's project names (app.py): the name stays, because a project outlives an
upgrade."""

from __future__ import annotations

from fedtune.deploy.coordinator_run import conduct
from fedtune.flower.coordinator_app import coordinator_app

app = coordinator_app(conduct)

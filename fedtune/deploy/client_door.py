"""The ClientApp that a deployment's project names (app.py): the name stays, because a site of the version
before takes the project from its coordinator."""

from __future__ import annotations

from fedtune.flower.site_app import app

__all__ = ["app"]

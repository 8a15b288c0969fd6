"""A step of the chain that sends NaN or raises at one client, for the cases that have a fault (PEERS_FAULT): it is
installed as a user's own step is, as an entry point."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import probe

from fedtune.transforms.base import StepSettings, Transform
from fedtune.types import Client, Round, Update


class Fault(StepSettings):
    """step = "fault"."""

    step: Literal["fault"] = "fault"

    def build(self) -> Transform:
        return Faulty()


class Faulty(Transform):
    name = "fault"

    def on_client(self, update: Update, client: Client, now: Round) -> Update:
        probe.begin(client.id, now.number)
        return replace(update, tensors=dict(probe.spoiled(update.tensors, client.id, now.number)))

"""Ring numbers under masks: the server can read the sum of a round's answers, and no single one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from fedtune.errors import Refused
from fedtune.privacy.masks import LEAST, Session
from fedtune.schema import Schema
from fedtune.transforms.base import Kind, Question, StepSettings, Transform
from fedtune.types import Client, Round, Tensors, Update


class MaskSettings(StepSettings):
    """[[chain]] step = "mask": secure aggregation (Bonawitz et al. 2017), of three clients or more. Behind
    `ring`, which is put before it where the chain does not have it."""

    step: Literal["mask"] = "mask"
    threshold: float = Field(2 / 3, gt=0.5, le=1.0)
    """Share of the members that must come through every step; fewer open nothing, and fewer together with the
    server learn nothing."""

    def build(self) -> Mask:
        return Mask(self.threshold)

    def conflicts(self, recipe: Any) -> Iterator[tuple[str, str, str]]:
        known = len(recipe.deploy.sites) or (
            LEAST if recipe.partition.open_ended else recipe.partition.clients
        )
        if (asked := min(known, recipe.sampling.count or known)) < LEAST:
            yield (
                f"[[chain]] step = 'mask' with {asked} clients a round",
                f"{LEAST} or more: of two, each would know the other's answer",
                "ask more clients, or remove 'mask'",
            )
        for step in recipe.chain:
            if step.build().gives == "packed":
                yield (
                    f"[[chain]] step = '{step.step}' beside 'mask': which numbers a site sends, and at what "
                    "scale, would show them singly",
                    "all numbers, at a scale that all share: step 'ring'",
                    f"remove '{step.step}'",
                )
        if recipe.limits.norm:
            yield (
                "limits.norm beside [[chain]] step = 'mask', under which no answer's norm can be seen",
                "a bound that each site applies itself: clip of step 'ring'",
                "remove limits.norm",
            )


class Mask(Transform):
    name = "mask"
    undone: ClassVar[Literal["reply", "sum"]] = "sum"
    takes: ClassVar[Kind] = "ring"
    gives: ClassVar[Kind] = "ring"
    hides: ClassVar[bool] = True

    def __init__(self, threshold: float, question: Question | None = None) -> None:
        self.threshold, self.question = threshold, question

    def bound(self, question: Question) -> Mask:
        return Mask(self.threshold, question)

    def bits(self, schema: Schema, before: float) -> float:
        return before

    def on_client(self, update: Update, client: Client, now: Round) -> Update:
        """Masks come off the sum by an exchange of their own (runtime/masked.py), before `ring`."""
        if self.question is None:
            raise RuntimeError("a mask belongs to one question's chain")
        session = session_of(client, self.question, now)
        after, covered = session.cover(flat(update.tensors))
        keep(client, self.question, now, after)
        return replace(update, tensors=parts(covered, update.tensors))


def flat(tensors: Tensors) -> np.ndarray:
    """All numbers, in name order."""
    return np.concatenate([tensors[name].reshape(-1) for name in sorted(tensors)])


def parts(vector: np.ndarray, like: Tensors) -> dict[str, np.ndarray]:
    """A flat vector as tensors of these names and shapes."""
    out, at = {}, 0
    for name in sorted(like):
        out[name] = vector[at : at + like[name].size].reshape(like[name].shape)
        at += like[name].size
    return out


# --- a client's sessions ---


def name_of(question: Question, now: Round) -> bytes:
    """What a masked sum is called, 32 bytes: no two of one run are called the same."""
    about = [question.run, now.number, question.verb, question.attempt]
    return hashlib.sha256(json.dumps(about).encode()).digest()


def place_of(question: Question, now: Round) -> str:
    return f"{question.run}-{now.number}-{question.verb}-{question.attempt}"


def session_of(client: Client, question: Question, now: Round) -> Session:
    """Raises Refused W608 where the client has no keys of this sum."""
    kept = client.vault.read(place_of(question, now))
    if kept is None:
        raise Refused(
            "W608",
            f"a step of a masked sum of which '{client.name}' has no keys",
            "one that it made keys for",
            "the coordinator goes on without this client, or begins anew",
        )
    return Session.from_bytes(kept)


def keep(client: Client, question: Question, now: Round, session: Session) -> None:
    client.vault.write(place_of(question, now), session.to_bytes())

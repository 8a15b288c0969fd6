"""The base of a coordinator that computes nothing with it: names, shapes, first values and a fingerprint are
what a run on real sites asks of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedtune.config import Recipe, method_of
from fedtune.data import Federation
from fedtune.types import LM_TASKS

if TYPE_CHECKING:
    from fedtune.model.base import Base

# methods whose state is made of adapters, which are the same on a base in any type
ADAPTERS = frozenset({"fedpeft", "experts"})


def rests(recipe: Recipe, federation: Federation) -> bool:
    """Whether a coordinator runs the network for nothing: it scores no rows, watches no rounds with rows of
    its own, distils no emulator, and tells nobody what a part of the model should say."""
    computes = federation.test or recipe.watch.every or recipe.method.public
    return not computes and method_of(recipe).capabilities.split is None


def resting_base(recipe: Recipe, federation: Federation) -> Base:
    """The base on the CPU, whatever GPU there is. What is not rounded is not copied: a language model in its
    checkpoint's own type stays mapped from the files, where it takes memory as long as nothing else wants it.
    Task heads are drawn in the type that model.dtype says, and methods other than ADAPTERS work in it.

    recipe  with paths as seen from here
    """
    from fedtune.model.base import dtype_of, load, stored_here

    free = recipe.data.task in LM_TASKS and recipe.method.type in ADAPTERS and recipe.model.dtype == "auto"
    dtype = str(stored_here(recipe.model) if free else dtype_of(recipe.model)).removeprefix("torch.")
    settings = recipe.model.model_copy(update={"device": "cpu", "dtype": dtype})
    return load(settings, recipe.data.task, federation.labels, recipe.seed)

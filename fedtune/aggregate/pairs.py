"""LoRA pairs in a dict of tensors: `<module>.lora_A.weight` (r x k) and `<module>.lora_B.weight` (d x r),
peft's names.

LoRA of an embedding table is a pair as well, `<module>.lora_embedding_A` (r x words) and `_B` (width x r):
its product is what is added
to the table, transposed, so that every rule of products holds for it. peft starts it the other way round, A
at zero and B at random.
What is not a pair (biases, task heads, trained embeddings, DoRA's magnitude vectors) is the rest, and every
rule averages it plainly.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from fedtune.errors import FedtuneError
from fedtune.types import Tensors

FACTOR = re.compile(r"^(.+)\.lora_(A|B)\.weight$|^(.+\.lora_embedding)_(A|B)$")
RESIDUAL = re.compile(r"^(.+)\.residual_(A|B)$")
EMBEDDING = ".lora_embedding"  # how the module of an embedding's pair ends


class Pair(NamedTuple):
    """Two factors of one module: B (d x r) and A (r x k). Their product, times a scale, is added to the
    weight (d x k)."""

    B: np.ndarray
    A: np.ndarray

    @property
    def rank(self) -> int:
        return int(self.A.shape[0])


def split(tensors: Tensors) -> tuple[dict[str, Pair], dict[str, np.ndarray]]:
    """The pairs by module, in name order, and the rest. Raises M305 for half a pair or factors that do not
    fit.

    >>> factors = {"q.lora_A.weight": np.ones((2, 5)), "q.lora_B.weight": np.ones((3, 2))}
    >>> pairs, rest = split({**factors, "head.bias": np.ones(4)})
    >>> pairs["q"].rank, list(rest)
    (2, ['head.bias'])
    """
    return gathered(tensors, FACTOR, "lora_A.weight and lora_B.weight")


def join(pairs: Mapping[str, Pair], rest: Tensors) -> dict[str, np.ndarray]:
    """The inverse of `split`, as float32."""
    tensors = dict(rest)
    for module, pair in pairs.items():
        tensors[name_of(module, "A")], tensors[name_of(module, "B")] = pair.A, pair.B
    return {name: np.asarray(tensors[name], dtype=np.float32, order="C") for name in sorted(tensors)}


def name_of(module: str, factor: str) -> str:
    """The inverse of `factor_of`, for pairs."""
    return f"{module}_{factor}" if module.endswith(EMBEDDING) else f"{module}.lora_{factor}.weight"


def factor_of(name: str, pattern: re.Pattern[str] = FACTOR) -> tuple[str, str] | None:
    """Module and factor of a tensor, None where it belongs to no pair.

    >>> factor_of("q.lora_A.weight"), factor_of("words.lora_embedding_B"), factor_of("head.bias")
    (('q', 'A'), ('words.lora_embedding', 'B'), None)
    """
    found = pattern.match(name)
    if not found:
        return None
    module, factor = [group for group in found.groups() if group is not None]
    return module, factor


def flat_residual(residual: Mapping[str, Pair]) -> dict[str, np.ndarray]:
    """A residual as named tensors, for a state or a message: `<module>.residual_A` (R x k) and
    `<module>.residual_B` (d x R)."""
    flat = {
        f"{module}.residual_{factor}": getattr(pair, factor)
        for module, pair in residual.items()
        for factor in ("A", "B")
    }
    return {name: flat[name] for name in sorted(flat)}


def residual_of(tensors: Tensors) -> dict[str, Pair]:
    """The residual among named tensors: the inverse of `flat_residual`."""
    return gathered(tensors, RESIDUAL, "residual_A and residual_B")[0]


def factors(names: Iterable[str], factor: str) -> frozenset[str]:
    """Those names that are factor "A" or "B" of a pair, by the part that they play: "A" starts at random and
    "B" at zero, so that
    an embedding's `lora_embedding_B` counts as "A"."""
    other = {"A": "B", "B": "A"}[factor]
    return frozenset(
        name
        for name in names
        if (found := factor_of(name)) and found[1] == (other if found[0].endswith(EMBEDDING) else factor)
    )


def ranks(tensors: Tensors) -> dict[str, int]:
    """The rank of each module's pair."""
    return {module: pair.rank for module, pair in split(tensors)[0].items()}


def gathered(
    tensors: Tensors, pattern: re.Pattern[str], both: str
) -> tuple[dict[str, Pair], dict[str, np.ndarray]]:
    """Pairs whose names fit a pattern (module, factor), and the rest."""
    halves: dict[str, dict[str, np.ndarray]] = {}
    rest: dict[str, np.ndarray] = {}
    for name in sorted(tensors):
        found = factor_of(name, pattern)
        if found:
            halves.setdefault(found[0], {})[found[1]] = tensors[name]
        else:
            rest[name] = tensors[name]
    for module, half in halves.items():
        if len(half) != 2:
            missing = "B" if "A" in half else "A"
            raise FedtuneError(
                "M305",
                f"a pair without its factor {missing} in '{module}'",
                both,
                "send both factors of every module",
            )
        a, b = half["A"].shape, half["B"].shape
        if len(a) != 2 or len(b) != 2 or a[0] != b[1] or a[0] == 0:
            raise FedtuneError(
                "M305",
                f"factors A {a} and B {b} in '{module}'",
                "A (r x k) and B (d x r) with r >= 1",
                "offer LoRA of linear layers or embeddings",
            )
    return {module: Pair(half["B"], half["A"]) for module, half in halves.items()}, rest

"""Learning rates that fit: what `lr = "auto"`, `head_lr = "auto"` and `optimizer = "auto"` stand for.

Found by short runs with seed 11 on a tuning split of CLINC150 (MiniLM, width 384) and on tinyshakespeare
(width 64); docs/rates.md has the table. A matrix's step shrinks with the width of its layer, a vector's does
not (Yang et al. 2022, arXiv:2203.03466, table 8): at width 4096 LoRA's 2e-3 is 1.9e-4, what people use there.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple, TypeVar

from fedtune.model.settings import TrainSettings

WIDTH = 384  # of the model on which the rates were found


class Rates(NamedTuple):
    """Of one kind of adapter, at width 384."""

    lr: float
    head_lr: float = 1e-3  # of a task head that starts from the data, or that the model's file brings
    fresh_head_lr: float = 2e-2  # of one that starts at random
    optimizer: Literal["adamw", "sgd"] = "adamw"
    matrices: bool = True  # whether what is trained are matrices, whose rate goes with 1 / width
    tuned: bool = True  # whether it was found by runs, rather than taken from what others use


RATES: dict[str, Rates] = {
    "lora": Rates(2e-3),
    "adapter": Rates(2e-3),
    "full": Rates(1e-4),
    "bias": Rates(5e-3, matrices=False),
    "layernorm": Rates(5e-3, matrices=False),
    "ia3": Rates(1e-2, matrices=False),
    "prompt": Rates(1e-2, matrices=False),
    "prefix": Rates(1e-2, matrices=False),
    "p-tuning": Rates(1e-3),
    "shira": Rates(1e-3, tuned=False),  # ten times full tuning's, as LIFT's authors have at width 4,096
    "lift": Rates(1e-3, tuned=False),
    "dsee": Rates(1e-3, tuned=False),
    "deft": Rates(1e-3, tuned=False),
    "head": Rates(0.5, 0.5, 5.0, "sgd"),
}
OTHER = Rates(1e-3)  # kinds that plug-ins bring
Train = TypeVar("Train", bound=TrainSettings)


def rates_of(kind: str) -> Rates:
    """Of a kind of adapter; without one ("none"), every weight is trained."""
    return RATES.get("full" if kind == "none" else kind, OTHER)


def with_rates(
    train: Train,
    rates: Rates,
    width: int,
    head_starts: bool = True,
    otherwise: Literal["adamw", "sgd"] = "adamw",
) -> Train:
    """The settings with a number wherever they say "auto". A rate that they give is the head's too, unless
    that has its own.

    width        of the model's hidden states; 0 where nobody knows
    head_starts  whether the task head starts from the data (or is a file's own) rather than at random
    otherwise    the optimiser of a rate that they give, where they name none
    """
    open_ = train.lr == "auto"
    shrink = WIDTH / width if rates.matrices and width else 1.0
    own = rates.head_lr if head_starts else rates.fresh_head_lr
    default = rates.optimizer if open_ else otherwise
    values = {
        "optimizer": default if train.optimizer == "auto" else train.optimizer,
        "lr": rounded(rates.lr * shrink) if train.lr == "auto" else train.lr,
        "head_lr": (own if open_ else 0.0) if train.head_lr == "auto" else train.head_lr,
        "clip": train.longest_gradient,
    }
    return train.model_copy(update=values)


def rate_conflicts(train: TrainSettings, kind: str, rates: Rates) -> Iterator[tuple[str, str, str]]:
    """For a table's `conflicts`: the rates of a kind were found for one optimiser."""
    known = rates.optimizer
    if train.lr == "auto" and train.optimizer not in ("auto", known):
        yield (
            f"method.train.optimizer = '{train.optimizer}' without method.train.lr",
            f"a learning rate, because the one that is known for '{kind}' is for '{known}'",
            "set method.train.lr",
        )


def rounded(rate: float) -> float:
    """To two digits, as somebody would write it.

    >>> rounded(2e-3 * 384 / 4096)
    0.00019
    """
    return float(f"{rate:.2g}")

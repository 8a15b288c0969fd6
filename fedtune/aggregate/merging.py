"""Merging finished experts into one adapter, once: at export, or the experts of clusters. On the products B
A, never on the factors.

    MERGES["ties"](density=0.2)(experts, rank, scale) -> Combined

`rank` and `scale` are those of the result; rank 0 is exact concatenation, for the merges that only weigh and
add. report["error"] is
what cutting to the rank lost, relative to the merged product, `layers` the same by module. Tensors that are
no pairs are averaged.
Every round, use a rule: these trim without error feedback and bias what is trained further.

Thresholds are found in each module, as peft and mergekit do; the papers of TIES and PCB take the whole
vector.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence

import numpy as np

from fedtune.aggregate.answer import ClientAdapter, Combined
from fedtune.aggregate.elementwise import Across, factored, product_entries
from fedtune.aggregate.pairs import Pair, join, split
from fedtune.aggregate.pcb import pcb_entries
from fedtune.aggregate.product import ProductSum, inner, ratio
from fedtune.aggregate.residual import as_adapter, narrowed
from fedtune.aggregate.single_answers import HeldAdapter, hold
from fedtune.aggregate.weighted_mean import WeightedMean
from fedtune.errors import FedtuneError
from fedtune.rng import stream

Merge = Callable[[Sequence[ClientAdapter], int, float], Combined]
Entries = Callable[[str, list[HeldAdapter], list[Pair]], Across]
BLOCK_NUMBER = re.compile(r"\.(\d+)\.")


# --- those that weigh and add ---


def mean() -> Merge:
    """The mean of products: SELMA (Li et al. 2024, arXiv:2403.06952), which weighs experts equally; here by
    their weights."""
    return lambda experts, rank, scale: weighed(experts, rank, scale, 1.0)


def task(lam: float = 0.3) -> Merge:
    """Task arithmetic (Ilharco et al. 2023, arXiv:2212.04089): lam times the sum; 0.3 to 0.4 is theirs for
    eight tasks, below 0 forgets."""
    finite("lam", lam)
    return lambda experts, rank, scale: weighed(experts, rank, scale, lam * len(experts))


def lines(alpha: float, beta: float, of: Merge | None = None) -> Merge:
    """LiNeS (Wang et al. 2024, arXiv:2410.17146): block l of L is multiplied by alpha + beta l / (L - 1),
    what is in no block by alpha.

    Follows any other merge (by default the mean), exactly: only B changes.
    """
    finite("alpha", alpha)
    finite("beta", beta)
    merge = of or mean()

    def merged(experts: Sequence[ClientAdapter], rank: int, scale: float) -> Combined:
        made = merge(experts, rank, scale)
        pairs, rest = split(made.tensors)
        depth = {name: int(found.group(1)) for name in pairs if (found := BLOCK_NUMBER.search(name))}
        last = max(depth.values(), default=0) or 1
        times = {name: alpha + beta * depth.get(name, 0) / last for name in pairs}
        longer = {name: Pair(pair.B * np.float64(times[name]), pair.A) for name, pair in pairs.items()}
        kept = {
            name: inner(pair, pair) for name, pair in longer.items()
        }  # with what a cut lost, which is orthogonal to it, the whole by Pythagoras
        whole = {name: square / (1 - made.layers[name] ** 2) for name, square in kept.items()}
        error = ratio(
            math.sqrt(max(0.0, sum(whole.values()) - sum(kept.values()))), math.sqrt(sum(whole.values()))
        )
        return Combined(join(longer, rest), report=dict(made.report) | {"error": error}, layers=made.layers)

    return merged


def soup(score: Callable[[Combined], float], of: Merge | None = None) -> Merge:
    """Greedy soup (Wortsman et al. 2022, arXiv:2203.05482): from the best expert on, each is added unless the
    score drops.

    `score` is higher for better, on held-out data of the server. Raises W607 for a score that is not a
    number, which has no order.
    """
    merge = of or mean()

    def scored(held: Sequence[ClientAdapter], rank: int, scale: float) -> float:
        value = float(score(merge(held, rank, scale)))
        if math.isnan(value):
            clients = ", ".join(str(expert.client) for expert in held)
            raise FedtuneError(
                "W607",
                f"a score of NaN for a soup of experts {clients}",
                "a number, higher for better",
                "fix the score, or leave the expert out",
            )
        return value

    def merged(experts: Sequence[ClientAdapter], rank: int, scale: float) -> Combined:
        if not experts:
            return merge(experts, rank, scale)  # which refuses
        alone = [scored([expert], rank, scale) for expert in experts]
        order = np.argsort([-value for value in alone], kind="stable")
        held, best = [experts[order[0]]], alone[order[0]]
        for i in order[1:]:
            tried = scored([*held, experts[i]], rank, scale)
            if tried >= best:
                held, best = [*held, experts[i]], tried
        made = merge(held, rank, scale)
        kept = {"score": best, "kept": float(len(held))} | {f"kept/{expert.client}": 1.0 for expert in held}
        return Combined(made.tensors, report=dict(made.report) | kept, layers=made.layers)

    return merged


def weighed(experts: Sequence[ClientAdapter], rank: int, scale: float, times: float) -> Combined:
    """`times` the weighted mean of products, through the stacked factors: never a d x k matrix."""
    held = hold(experts, Combined(experts[0].tensors if experts else {}))
    total = sum(h.answer.weight for h in held)
    pairs: dict[str, Pair] = {}
    for name in held[0].pairs:
        product = ProductSum()
        for h in held:
            if h.pairs[
                name
            ].A.any():  # a pair of zeros, which an adapter without this layer has, is no rank of the result
                product.add(h.pair(name), times * h.answer.weight / total)
        pairs[name] = (
            product.stacked() if product.parts else Pair(0 * held[0].pairs[name].B, held[0].pairs[name].A)
        )
    if rank < 1:
        return Combined(
            as_adapter(Combined(join(pairs, averaged(held))), 1.0, rank, scale)[0],
            report={"error": 0.0},
            layers=dict.fromkeys(pairs, 0.0),
        )
    cut, layers, error = narrowed({name: Pair(pair.B / scale, pair.A) for name, pair in pairs.items()}, rank)
    return Combined(join(cut, averaged(held)), report={"error": error}, layers=layers)


# --- those that look at single entries ---


def ties(density: float = 0.2, lam: float = 1.0) -> Merge:
    """TIES (Yadav et al. 2023, arXiv:2306.01708): trim, elect a sign, average those that agree, over the
    weight of those that agree.

    density 0.2 is theirs; a tie of signs goes to plus.
    """
    within("density", density, 0 < density <= 1, "above 0, at most 1")
    finite("lam", lam)

    def across(module: str, held: list[HeldAdapter], parts: list[Pair]) -> Across:
        least = column([largest(part, density) for part in parts])
        weights = column([h.answer.weight for h in held])

        def merge(tau: np.ndarray) -> np.ndarray:
            tau = np.where(np.abs(tau) >= least, tau, 0.0)
            sign = np.where((weights * tau).sum(axis=0) >= 0, 1.0, -1.0)
            agree = weights * (tau * sign > 0)
            return lam * quotient((agree * tau).sum(axis=0), agree.sum(axis=0))

        return merge

    return by_entries(across)


def dare(p: float = 0.5, seed: int = 0) -> Merge:
    """DARE (Yu et al. 2024, arXiv:2311.03099): entries are dropped with probability p and the others divided
    by 1 - p, then the mean."""
    within("p", p, 0 <= p < 1, "0 or more, below 1: dropping all leaves nothing to divide")
    within("seed", seed, seed >= 0, "0 or more")

    def across(module: str, held: list[HeldAdapter], parts: list[Pair]) -> Across:
        draws = [stream(f"dare {module}", seed, h.answer.client) for h in held]
        weights = column([h.answer.weight / sum(h.answer.weight for h in held) / (1 - p) for h in held])

        def merge(
            tau: np.ndarray,
        ) -> np.ndarray:  # blocks come in row order, so the draws do not depend on their size
            kept = np.stack([draw.random(tau.shape[1:]) >= p for draw in draws])
            summed: np.ndarray = (weights * kept * tau).sum(axis=0)
            return summed

        return merge

    return by_entries(across)


def breadcrumbs(keep: float = 0.85, outliers: float = 0.01, lam: float = 0.3) -> Merge:
    """Model Breadcrumbs (Davari and Belilovsky 2024, arXiv:2312.06795): of each expert the greatest `keep`
    without the `outliers`, lam times the sum.

    Per module, as the paper says; its code masks per row.
    """
    within("outliers", outliers, 0 <= outliers < 1, "0 or more, below 1")
    within("keep", keep, outliers < keep <= 1, f"above outliers = {outliers:g}, at most 1")
    finite("lam", lam)

    def across(module: str, held: list[HeldAdapter], parts: list[Pair]) -> Across:
        least, most = (
            column([largest(part, keep) for part in parts]),
            column([largest(part, outliers) for part in parts]),
        )
        mean_weight = sum(h.answer.weight for h in held) / len(held)
        weights = column([lam * h.answer.weight / mean_weight for h in held])

        def merge(tau: np.ndarray) -> np.ndarray:
            size = np.abs(tau)
            summed: np.ndarray = (weights * np.where((size >= least) & (size < most), tau, 0.0)).sum(axis=0)
            return summed

        return merge

    return by_entries(across)


def pcb(keep: float = 0.2, lam: float = 1.0) -> Merge:
    """PCB-Merging (Du et al. 2024, arXiv:2410.02396) by the formula of its released code, which is not the
    paper's: both are in `pcb`.

    `keep` is the share of entries above the floor. Weights do not count.
    """
    within("keep", keep, 0 < keep <= 1, "above 0, at most 1")
    finite("lam", lam)
    return by_entries(lambda module, held, parts: pcb_entries(parts, keep, lam))


def by_entries(entries: Entries) -> Merge:
    """A merge of single entries, one module at a time, then the best pair of `rank`. Raises C102 for rank 0:
    the result has full rank."""

    def merged(experts: Sequence[ClientAdapter], rank: int, scale: float) -> Combined:
        if rank < 1:
            raise FedtuneError(
                "C102",
                f"rank {rank} for a merge of single entries",
                "1 or more",
                "choose the rank of the result",
            )
        held = hold(experts, Combined(experts[0].tensors if experts else {}))
        pairs: dict[str, Pair] = {}
        layers, lost, whole = dict[str, float](), 0.0, 0.0
        for name in held[0].pairs:
            parts = [h.pair(name) for h in held]
            matrix = product_entries(parts, entries(name, held, parts))
            pairs[name], layers[name] = factored(matrix, rank, scale, name, parts[0].A)
            square = float(np.sum(np.square(matrix)))
            lost, whole = lost + square * layers[name] ** 2, whole + square
        return Combined(
            join(pairs, averaged(held)),
            report={"error": ratio(math.sqrt(lost), math.sqrt(whole))},
            layers=layers,
        )

    return merged


def within(name: str, value: float, fits: bool, expected: str) -> None:
    """Options are checked when a merge is made, before an expert is read. NaN fits nowhere. Raises C102."""
    if not fits:
        raise FedtuneError("C102", f"{name} = {value:g} for a merge", expected, f"choose another {name}")


def finite(name: str, value: float) -> None:
    within(name, value, math.isfinite(value), "a finite number")


def averaged(held: list[HeldAdapter]) -> dict[str, np.ndarray]:
    rest = WeightedMean()
    for h in held:
        rest.add(h.rest, h.answer.weight)
    return rest.mean()


def largest(pair: Pair, share: float) -> float:
    """The least magnitude among the greatest `share` of a product's entries; one expert's d x k stands in
    memory. inf for none."""
    entries = np.abs(pair.B @ pair.A).reshape(-1)
    count = round(share * entries.size)
    return float(np.partition(entries, entries.size - count)[entries.size - count]) if count else math.inf


def column(numbers: Sequence[float]) -> np.ndarray:
    """One number an expert, to be met with (experts, rows, k)."""
    return np.array(numbers)[:, None, None]


def quotient(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    result: np.ndarray = np.divide(above, below, out=np.zeros_like(above), where=below != 0)
    return result


MERGES: dict[str, Callable[..., Merge]] = {
    "mean": mean,
    "task": task,
    "ties": ties,
    "dare": dare,
    "breadcrumbs": breadcrumbs,
    "lines": lines,
    "pcb": pcb,
    "soup": soup,
}

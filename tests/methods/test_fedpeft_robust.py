"""Rules that read single answers: liars, NaN, too few answers, steps that would hide them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedtune.aggregate import RULES
from fedtune.errors import FedtuneError
from fedtune.events import Event, RoundDone
from fedtune.methods.fedpeft import FedPEFT
from fedtune.rules import check_single_answers
from fedtune.runtime.checkpoints import ClientStates
from fedtune.runtime.run import run
from fedtune.runtime.workspace import build_workspace
from fedtune.schema import digest
from fedtune.transforms import Chain, Transform
from fedtune.types import Round, State, Tensors
from tests import small
from tests.marks import mostly_thorough
from tests.methods.test_fedpeft_rules import A, B, factors, states
from tests.proxy import with_work


def test_a_rule_that_reads_single_answers_is_refused_beside_a_step_that_hides_them() -> None:
    class Mask(Transform):
        name, undone, hides = "mask", "sum", True

    check_single_answers(RULES["rolora"](), Chain([Mask()]))
    with pytest.raises(FedtuneError, match=r"C104.*'median'.*'mask'.*fedsa, fedsb, ffa, hft, mean, rolora"):
        check_single_answers(RULES["median"](), Chain([Mask()]))


@pytest.mark.parametrize("rule", mostly_thorough(["median", "trimmed", "krum", "clipped"], ["median"]))
def test_a_robust_rule_shrugs_off_one_liar_of_five(
    rule: str, tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    """One client sends its move times -10; the honest mean stays nearer to a robust result than to the plain
    mean."""
    from fedtune.runtime.local import local_transport
    from fedtune.runtime.protocol import Link, Transport
    from fedtune.runtime.workspace import Workspace

    def lying(link: Link, workspace: Workspace) -> Transport:
        real = link.method

        def train(client: Any, given: Tensors, now: Any) -> Any:
            update = real.verbs["train"].work(client, given, now)
            if client.id != 1:
                return update
            return replace(
                update,
                tensors={
                    n: (given[n] - 10 * (v / update.weight - given[n])) * update.weight
                    for n, v in update.tensors.items()
                },
            )

        return local_transport(
            replace(link, method=with_work(real, lambda work: train)), workspace.client, workspace.done
        )

    def final(name: str, liar: bool) -> Tensors:
        recipe = small.recipe(
            tiny_bert, data, partition__clients=5, rounds=1, aggregate={"rule": name}, method__weight="equal"
        )
        folder = small.create(tmp_path / f"{name}-{liar}", "", "run")
        folder.write_json("config.json", recipe.model_dump(mode="json"))
        run(recipe, folder, lambda event: None, lying if liar else None)
        return states(folder, 1).shared

    honest, fooled, robust = final("mean", False), final("mean", True), final(rule, True)

    def apart(one: Tensors, other: Tensors) -> float:
        pairs = [name.removesuffix(A) for name in factors(one, A)]
        return float(sum(np.sum((one[p + B] @ one[p + A] - other[p + B] @ other[p + A]) ** 2) for p in pairs))

    assert apart(robust, honest) < 0.35 * apart(fooled, honest)


@pytest.mark.parametrize("rule", ["mean", "ffa", "flexlora", "fair", "hetlora"])
@pytest.mark.parametrize("ranks", [(), (1, 2, 4)])
def test_rslora_scales_products_and_what_is_no_pair_is_averaged_plainly(
    rule: str, ranks: tuple[int, ...], tiny_bert: Path, data: Path
) -> None:
    """DoRA's magnitudes, the head and its bias: the weighted mean. The products: B @ A times alpha /
    sqrt(rank), each client's own."""
    from fedtune.runtime.cohort import RoundCohort
    from fedtune.runtime.local import local_transport
    from fedtune.runtime.workspace import link_of

    own = (
        {"method__lora_rank_by_client": list(ranks), "method__lora_alpha_by_client": [3.0, 5.0]}
        if ranks
        else {}
    )
    adapter = {"kind": "lora", "rank": 4, "alpha": 6.0, "rslora": True, "dora": True}
    if ranks and not RULES[rule].mixed:
        with pytest.raises(FedtuneError, match="flexlora, flora, hetlora"):
            small.recipe(tiny_bert, data, aggregate={"rule": rule}, method__adapter=adapter, **own)
        return
    recipe = small.recipe(tiny_bert, data, aggregate={"rule": rule}, method__adapter=adapter, **own)
    method = recipe.method.build(3, recipe.aggregate)
    assert isinstance(method, FedPEFT)
    scales = [method.seat(client)[1] for client in range(4)]
    assert scales == pytest.approx(
        [3 / 1, 5 / 2**0.5, 3 / 2, 5 / 1] if ranks else [3.0] * 4
    )  # 6 / sqrt(4) is the server's
    workspace = build_workspace(recipe, method, ClientStates(None), lambda event: None)
    link, now, start = (
        link_of(workspace, method),
        Round(2, recipe.seed, (0, 1, 2, 3)),
        method.start(workspace.tunable),
    )
    learned = State(
        {
            name: np.float32(value + 0.1 * np.random.default_rng(len(name)).normal(size=value.shape))
            for name, value in start.shared.items()
        }
    )
    answers: dict[int, Any] = {}

    def train(client: Any, given: Tensors, now: Any) -> Any:
        answers[client.id] = method.verbs["train"].work(client, given, now)
        return answers[client.id]

    cohort = RoundCohort(
        link,
        now,
        local_transport(
            replace(link, method=with_work(method, lambda work: train)), workspace.client, workspace.done
        ),
        lambda event: None,
        workspace.names,
    )
    made = method.round(learned, cohort, now).shared
    total = sum(update.weight for update in answers.values())
    plain = [name for name in made if not name.endswith((A, B))]
    assert any("lora_magnitude_vector" in name for name in plain) and any(
        name.endswith("classifier.bias") for name in plain
    )
    for name in plain:
        np.testing.assert_allclose(
            made[name], sum(update.tensors[name] for update in answers.values()) / total, rtol=1e-6, atol=1e-8
        )
    if rule != "flexlora":
        return
    for module in (name.removesuffix(A) for name in factors(made, A)):
        wanted = (
            sum(
                update.weight
                * scales[client]
                * update.values()[module + B].astype(np.float64)
                @ update.values()[module + A]
                for client, update in answers.items()
            )
            / total
        )
        values = np.linalg.svd(wanted, compute_uv=False)
        lost = np.linalg.norm(3.0 * made[module + B].astype(np.float64) @ made[module + A] - wanted)
        assert lost == pytest.approx(
            np.linalg.norm(values[4:]), rel=1e-4, abs=1e-6 * values[0]
        )  # what the best of rank 4 loses


@pytest.mark.parametrize("rule", mostly_thorough(sorted(RULES), ["mean", "flora", "krum", "fair"]))
def test_a_client_with_nan_counts_like_one_that_did_not_answer(
    rule: str, tiny_bert: Path, data: Path
) -> None:
    """One of six: left out by name (W607), and the result is to the bit that of the other five."""
    from fedtune.errors import ClientFailed
    from fedtune.events import ClientLeftOut
    from fedtune.runtime.cohort import RoundCohort
    from fedtune.runtime.local import local_transport
    from fedtune.runtime.protocol import Reply
    from fedtune.runtime.workspace import link_of

    recipe = small.recipe(tiny_bert, data, partition__clients=6, rounds=2, aggregate={"rule": rule})
    method = recipe.method.build(2, recipe.aggregate)
    workspace = build_workspace(recipe, method, ClientStates(None), lambda event: None)
    link, now, start = (
        link_of(workspace, method),
        Round(1, recipe.seed, tuple(range(6))),
        method.start(workspace.tunable),
    )

    def train(client: Any, given: Tensors, now: Any) -> Any:
        update = method.verbs["train"].work(client, given, now)
        return (
            replace(update, tensors={n: v * np.nan for n, v in update.tensors.items()})
            if client.id == 2
            else update
        )

    honest, poisoned = (
        local_transport(own, workspace.client, workspace.done)
        for own in (link, replace(link, method=with_work(method, lambda work: train)))
    )
    gone = ClientFailed("F503", "no answer", "one", "wait")
    told: list[Event] = []
    spoiled = method.round(start, RoundCohort(link, now, poisoned, told.append, workspace.names), now)
    without = RoundCohort(
        link,
        now,
        lambda asks: [Reply(2, failure=gone) if r.client == 2 else r for r in honest(asks)],
        lambda event: None,
        workspace.names,
    )
    assert digest(spoiled.shared) == digest(method.round(start, without, now).shared) != digest(start.shared)
    assert [(e.client, e.code) for e in told if isinstance(e, ClientLeftOut)] == [(2, "W607")]


def test_krum_with_too_few_answers_skips_the_round_and_the_run_goes_on(
    tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    """One of five drops out in round 2: four answers are too few where one may be faulty. Nothing is learned
    there, nobody's state moves."""
    from fedtune.errors import ClientFailed
    from fedtune.events import Noted
    from fedtune.runtime.journal import Journal
    from fedtune.runtime.local import local_transport
    from fedtune.runtime.protocol import Ask, Link, Reply, Transport
    from fedtune.runtime.workspace import Workspace

    recipe = small.recipe(
        tiny_bert,
        data,
        partition__clients=5,
        aggregate={"rule": "krum"},
        chain=[{"step": "quantize", "bits": 4, "error_feedback": True}],
    )
    last: dict[int, set[int]] = {}  # round -> the rounds of whose answers the server says that they counted
    lost = Reply(3, failure=ClientFailed("F503", "no answer", "one", "wait"))

    def absent(link: Link, workspace: Workspace) -> Transport:
        real = local_transport(link, workspace.client, workspace.done)

        def carry(asks: Sequence[Ask]) -> list[Reply]:
            last[asks[0].now.number] = {ask.last for ask in asks}
            return [lost if (reply.client, asks[0].now.number) == (3, 2) else reply for reply in real(asks)]

        return carry

    seen: dict[int, State] = {}
    told: list[Event] = []

    def look(event: Event) -> None:
        told.append(event)
        if isinstance(event, RoundDone):
            seen[event.round] = states(small.RunFolder(tmp_path / "cut" / "run"), event.round)

    folder, result, _ = small.play(recipe, tmp_path / "cut", tell=look, carry=absent)
    for name, value in seen[1].shared.items():
        np.testing.assert_array_equal(seen[2].shared[name], value)
    assert any(np.any(seen[3].shared[name] != value) for name, value in seen[2].shared.items())
    done = {event.round: event for event in told if isinstance(event, RoundDone)}
    assert (
        done[2].metrics == {"skipped": 1.0}
        and done[2].left_out == 5
        and result["left_out"] == 5
        and done[3].left_out == 0
    )
    assert next(e.text for e in told if isinstance(e, Noted)).startswith(
        "round 2 changes nothing: R410: found 4 answers where 1 may be faulty, expected at least 5"
    )
    journal = Journal(folder.journal)
    outcomes = [
        (number, answer.client, answer.outcome) for number, answer in journal.answers() if number == 2
    ]
    journal.close()
    assert outcomes == [(2, client, "F503" if client == 3 else "R410") for client in range(5)]
    assert last == {
        1: {0},
        2: {1},
        3: {1},
    }  # what error feedback owes in round 3 is what was owed after round 1: round 2 was not received

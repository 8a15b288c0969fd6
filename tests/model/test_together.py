"""Several clients in one pass: each ends where it would have ended alone, whatever the others do."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from fedtune.errors import ClientFailed, FedtuneError
from fedtune.model import together
from fedtune.model.adapters import ADAPTERS
from fedtune.model.collate import collation
from fedtune.model.fit import fit
from fedtune.model.settings import TrainSettings
from fedtune.model.stacked import Stacked
from fedtune.model.together import Trainee, fit_together
from fedtune.model.tunable import TunableModel, attach
from tests.marks import mostly_thorough
from tests.tables import adapter_of

SETTINGS = TrainSettings(steps=3, lr=0.05, batch=3, optimizer="sgd", clip=0.3, prox=0.1)
STACKS = sorted(kind for kind, settings in ADAPTERS.items() if settings.stacks)


def starts(tunable: TunableModel, count: int) -> Iterator[dict[str, np.ndarray]]:
    draw = np.random.default_rng(5)
    for _ in range(count):
        noise = {n: v + 0.05 * draw.standard_normal(v.shape) for n, v in tunable.read().items()}
        yield {name: value.astype(np.float32) for name, value in noise.items()}


def clients_of(workspace: Any, model: str, tunable: TunableModel, sizes: tuple[int, ...]) -> list[Trainee]:
    """Clients of so many examples each, no two with the same ones first."""
    whole = workspace.encoded(model)
    found = []
    for place, (size, start) in enumerate(zip(sizes, starts(tunable, len(sizes)), strict=True)):
        examples = [whole[(place + n) % len(whole)] for n in range(size)]
        encoded = replace(whole, examples=examples, collate=collation(examples, tunable.base))
        found.append(Trainee(encoded, start, 40 + place))
    return found


@pytest.mark.parametrize(
    "objective", mostly_thorough([{}, {"loss": "focal"}, {"loss": "asft"}], [{}]), ids=str
)
@pytest.mark.parametrize("kind", STACKS)
@pytest.mark.parametrize("model", ["causal", "encoder", "decoder", "images"])
def test_every_client_ends_where_it_would_have_ended_alone(
    workspace: Any, model: str, kind: str, objective: dict[str, str]
) -> None:
    base = workspace.base(model)
    try:
        tunable = attach(base, adapter_of(kind=kind), 1)
    except FedtuneError as error:
        pytest.skip(error.found)  # an output layer that is tied
    if objective.get("loss") == "asft" and not (tunable.settings and tunable.settings.switches_off):
        pytest.skip("nothing to refer to")
    settings = TrainSettings.model_validate(
        {**SETTINGS.model_dump(), "objective": objective or {"loss": "cross-entropy"}}
    )
    trainees = clients_of(workspace, model, tunable, (6, 2, 5))
    before = tunable.read()
    found = fit_together(tunable, trainees, settings, frozenset(tunable.named), (1, 4))
    assert all((tunable.read()[name] == value).all() for name, value in before.items())
    for one, got in zip(trainees, found, strict=True):
        assert not isinstance(got, ClientFailed)
        tunable.write(one.start)
        alone = fit(tunable, one.encoded, settings, one.seed, (1, 4))
        report, values = got
        assert (report.steps, report.examples, report.tokens) == (alone.steps, alone.examples, alone.tokens)
        assert report.loss == pytest.approx(alone.loss, rel=1e-5)
        for name, value in tunable.read().items():
            moved = np.abs(value - one.start[name]).max()
            np.testing.assert_allclose(values[name], value, rtol=1e-5, atol=1e-5 * moved + 1e-7, err_msg=name)


def test_other_steps_and_micro_batches_for_each(workspace: Any) -> None:
    """Whole epochs: clients with more rows take more steps, the others' tensors stand still meanwhile."""
    tunable = attach(workspace.base("causal"), adapter_of(kind="lora", rank=2), 1)
    settings = TrainSettings(
        steps=0, epochs=1, lr=0.01, batch=1, accumulate=2, optimizer="adamw", schedule="cosine"
    )
    trainees = clients_of(workspace, "causal", tunable, (5, 2, 1))
    found = fit_together(tunable, trainees, settings, frozenset(tunable.named))
    for one, got in zip(trainees, found, strict=True):
        assert not isinstance(got, ClientFailed)
        tunable.write(one.start)
        alone = fit(tunable, one.encoded, settings, one.seed)
        assert got[0].steps == alone.steps
        for name, value in tunable.read().items():
            np.testing.assert_allclose(got[1][name], value, rtol=1e-4, atol=1e-5, err_msg=name)


def test_what_is_not_trained_stays_and_is_each_clients_own(workspace: Any) -> None:
    tunable = attach(workspace.base("encoder"), adapter_of(kind="lora", rank=2), 1)
    trained = frozenset(name for name in tunable.named if "lora_A" not in name)
    trainees = clients_of(workspace, "encoder", tunable, (4, 4))
    for one, got in zip(trainees, fit_together(tunable, trainees, SETTINGS, trained), strict=True):
        assert not isinstance(got, ClientFailed)
        for name, value in got[1].items():
            assert (value == one.start[name]).all() == (name not in trained)


def test_a_client_that_diverges_fails_alone(workspace: Any) -> None:
    tunable = attach(workspace.base("encoder"), adapter_of(kind="lora", rank=2), 1)
    trainees = clients_of(workspace, "encoder", tunable, (4, 4, 4))
    broken = {name: np.full_like(value, np.nan) for name, value in trainees[1].start.items()}
    bad = [trainees[0], replace(trainees[1], start=broken), trainees[2]]
    first, second, third = fit_together(tunable, bad, SETTINGS, frozenset(tunable.named))
    assert isinstance(second, ClientFailed) and second.code == "W607"
    good = fit_together(tunable, [trainees[0], trainees[2]], SETTINGS, frozenset(tunable.named))
    for one, other in zip((first, third), good, strict=True):
        assert not isinstance(one, ClientFailed) and not isinstance(other, ClientFailed)
        for name, value in other[1].items():
            np.testing.assert_allclose(one[1][name], value, rtol=1e-5, atol=1e-7)


def test_too_little_memory_makes_smaller_groups(workspace: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tunable = attach(workspace.base("encoder"), adapter_of(kind="lora", rank=2), 1)
    trainees = clients_of(workspace, "encoder", tunable, (4, 4, 4, 4, 4))
    want = fit_together(tunable, trainees, SETTINGS, frozenset(tunable.named))
    real, groups = together.pass_together, []

    def small(one: Any, places: Any, active: Any, number: int) -> list[float]:
        groups.append(len(active))
        if len(active) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(one, places, active, number)

    monkeypatch.setattr(together, "pass_together", small)
    found = fit_together(tunable, trainees, SETTINGS, frozenset(tunable.named))
    tunable.base.fits.clear()
    assert groups[:5] == [5, 3, 2, 1, 2] and set(groups[2:]) == {1, 2}  # what was too much is not tried again
    for one, other in zip(found, want, strict=True):
        assert not isinstance(one, ClientFailed) and not isinstance(other, ClientFailed)
        for name, value in other[1].items():
            np.testing.assert_allclose(one[1][name], value, rtol=1e-5, atol=1e-7)


def test_other_operations_are_refused_in_a_sentence() -> None:
    own = Stacked(torch.zeros(2, 3))
    with pytest.raises(FedtuneError, match="M306: found an adapter that takes part in matmul"):
        torch.matmul(torch.zeros(4, 3), own)  # type: ignore[call-overload]
    with pytest.raises(FedtuneError, match="M306: found 5 rows of activations for 2 clients"):
        torch.zeros(5, 3) + own

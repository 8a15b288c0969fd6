"""Private class means: what one row changes, the noise, what is charged, where else noise may come from, and
recipes that could not keep the promise."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import dp_accounting
import numpy as np
import pytest
from dp_accounting import pld
from scipy import stats

from fedtune.config import Recipe
from fedtune.deploy.policy import Policy
from fedtune.deploy.site_privacy import cover, release
from fedtune.errors import FedtuneError
from fedtune.methods.head_start import FEATURES, LENGTH, TEMPERATURE
from fedtune.model.features import class_sums
from fedtune.privacy import noise
from fedtune.privacy.accountant import spent
from fedtune.privacy.releases import Release
from fedtune.runtime import run as running
from fedtune.runtime.check import check, rows
from fedtune.runtime.checkpoints import load_state
from fedtune.runtime.journal import Journal
from fedtune.runtime.run import run
from fedtune.types import Round, Update
from tests import small

ROWS = {"max_grad_norm": 1.0, "noise_multiplier": 2.0, "sample_rate": 0.2}
TRAIN = {"lr": 1e-9, "head_lr": 1e-9, "steps": 1, "batch": 4}
BY_ROW = {
    "method__head_start": "means",
    "method__head_noise": 3.0,
    "method__train": TRAIN | {"private": ROWS},
    "rounds": 2,
}
STEP = {"step": "private", "clip": 1e-6, "noise_multiplier": 3.0}
BY_CLIENT = {
    "method__head_start": "means",
    "method__head_noise": 0.0,
    "method__weight": "equal",
    "method__train": TRAIN,
    "chain": [STEP],
    "rounds": 2,
}
NOW = Round(1, 3, (0, 1, 2, 3))


def told(recipe: Recipe, client: int = 0) -> tuple[Update, Any]:
    """A client's answer to the question, and its workspace."""
    workspace, link = small.workspace_of(recipe)
    work = link.method.verbs[FEATURES].work
    return work(workspace.client_with(client, {}), {}, NOW), workspace


def lines(folder: small.RunFolder) -> list[Any]:
    journal = Journal(folder.journal)
    found = journal.charges()
    journal.close()
    return found


def test_a_row_changes_the_sums_by_one_at_most(tiny_bert: Path, data: Path) -> None:
    """Measured: each of a client's rows left out, and all of one class given another."""
    update, workspace = told(small.recipe(tiny_bert, data, **BY_ROW | {"method__head_noise": 0.0} | MUTE))
    rows_here, tunable = workspace.train(0), workspace.tunable
    whole = class_sums(tunable, rows_here)["sums"] * len(rows_here)
    np.testing.assert_allclose(update.tensors["sums"], whole, rtol=1e-12)
    apart = []
    for row in range(min(8, len(rows_here))):
        rest = rows_here.some([other for other in range(len(rows_here)) if other != row])
        apart.append(np.linalg.norm(whole - class_sums(tunable, rest)["sums"] * len(rest)))
    assert max(apart) <= 1 + 1e-6 and min(apart) > 1 - 1e-3


MUTE = {"method__train": TRAIN | {"private": ROWS | {"noise_multiplier": 0.0}}}


def test_without_noise_the_sums_are_the_plain_ones_to_the_bit_and_the_head_points_where_theirs_does(
    tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    def sums(**changes: Any) -> np.ndarray:
        update, _ = told(small.recipe(tiny_bert, data, method__head_start="means", **changes))
        return update.tensors["sums"]

    assert sums().tobytes() == sums(method__head_noise=0.0).tobytes()
    heads = []
    for number, more in enumerate(({}, {"method__head_noise": 0.0})):
        still = {"method__head_start": "means", "method__train": TRAIN, "rounds": 1}
        folder, _, _ = small.play(small.recipe(tiny_bert, data, **still | more), tmp_path / str(number))
        shared = load_state(folder, 1, "")[0].shared
        heads.append(next(v for n, v in shared.items() if "classifier" in n and v.ndim == 2).astype(float))
    plain, private = (head / np.linalg.norm(head, axis=1, keepdims=True) for head in heads)
    np.testing.assert_allclose(private, plain, atol=1e-5)


def test_the_noise_is_a_normal_one_of_its_size(tiny_bert: Path, data: Path) -> None:
    recipe = small.recipe(tiny_bert, data, **BY_ROW)
    quiet, workspace = told(small.recipe(tiny_bert, data, **BY_ROW | {"method__head_noise": 0.0} | MUTE))
    work = small.workspace_of(recipe)[1].method.verbs[FEATURES].work
    drawn = [work(workspace.client_with(0, {}), {}, NOW).tensors["sums"] for _ in range(20)]
    found = np.concatenate([(one - quiet.tensors["sums"]).ravel() for one in drawn])
    assert stats.kstest(found / 3.0, "norm").pvalue > 1e-6 and len({one.tobytes() for one in drawn}) == 20


class Nothing(noise.Secret):
    """A source of which every number is 0."""

    def normal(self, count: int) -> np.ndarray:
        return np.zeros(count)


def test_the_noise_comes_from_the_system_s_source_alone(
    tiny_bert: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where that says nothing, the sums are as they are, to the step that noise is laid on in."""
    monkeypatch.setattr(noise, "Secret", Nothing)
    update, workspace = told(small.recipe(tiny_bert, data, **BY_ROW))
    mine = workspace.train(0)
    want = class_sums(workspace.tunable, mine)["sums"] * len(mine)
    np.testing.assert_allclose(update.tensors["sums"], want, atol=3.0 * 2**-30)


def test_epsilon_is_that_of_the_sums_and_the_training_together(
    tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    recipe = small.recipe(tiny_bert, data, **BY_ROW)
    folder, result, _ = small.play(recipe, tmp_path)
    own = pld.PLDAccountant()
    step = dp_accounting.PoissonSampledDpEvent(0.2, dp_accounting.GaussianDpEvent(2.0))
    own.compose(dp_accounting.SelfComposedDpEvent(step, 2)).compose(dp_accounting.GaussianDpEvent(3.0))
    assert result["epsilon"] == pytest.approx(own.get_epsilon(1e-5), abs=1e-3)
    assert sorted((line.round, line.draw) for line in lines(folder) if line.client == 0) == [
        (1, "0"),
        (1, "0/before"),
        (2, "0"),
    ]
    checked = check(recipe)
    said = [line for line in rows(checked) if "privacy" in line]
    assert f"epsilon {result['epsilon']:.2f} at delta 1e-05 after 2 rounds" in said[0]
    alone = spent([Release("gaussian", "example", 3.0)], 1e-5).epsilon
    assert f"epsilon {alone:.2f} at delta 1e-05 of it for the class sums" in said[1]
    sees = {row.verb: row.sees for row in checked.exposed}[FEATURES]
    assert "of which a row changes no more than 1, under noise of 3" in sees and "share of each" not in sees


def test_a_crash_after_the_sums_charges_them_once(
    tiny_bert: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, real, tries = small.recipe(tiny_bert, data, **BY_ROW), running.save_state, list[int]()

    def dies(folder: Any, number: int, state: Any, held: Any) -> str:
        tries.append(number)
        if len(tries) == 1:
            raise KeyboardInterrupt
        return real(folder, number, state, held)

    monkeypatch.setattr(running, "save_state", dies)
    with pytest.raises(KeyboardInterrupt):
        small.play(recipe, tmp_path)
    folder = small.RunFolder(tmp_path / "run")
    assert [line.draw for line in lines(folder) if line.client == 2] == ["0", "0/before"]
    result = run(recipe, folder, lambda event: None)
    assert tries == [1, 1, 2]
    assert [line.draw for line in lines(folder) if line.client == 2] == ["0", "0/before", "0"]
    assert (
        result["epsilon"] == spent([line.release for line in lines(folder) if line.client == 2], 1e-5).epsilon
    )


@pytest.mark.parametrize("place", ["coordinator", "client", "shares"])
def test_a_step_covers_whole_answers_as_it_does_in_training(
    place: str, tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    """Each client's sums are brought to a length of 1: a client that falls away changes the sum by that."""
    step = STEP | {"place": place} | ({"honest": 0.4} if place == "shares" else {})
    chain = [step, {"step": "mask"}] if place == "shares" else [step]
    recipe = small.recipe(tiny_bert, data, **BY_CLIENT | {"chain": chain})
    folder, result, _ = small.play(recipe, tmp_path)
    assert result["epsilon"] == spent([Release("gaussian", "client", 3.0, count=3)], 1e-5).epsilon
    sees = {row.verb: row.sees for row in check(recipe).exposed}[FEATURES]
    assert "brought to a length of 1" in sees and "the sum only" in sees
    workspace, link = small.workspace_of(recipe)
    task = link.tasks[FEATURES]
    update = task.work(workspace.client_with(0, {}), {}, NOW)
    if place == "coordinator":
        sent = task.chain.send(update, workspace.client_with(0, {}), NOW)
        assert np.linalg.norm(sent.tensors["sums"]) == pytest.approx(1.0, abs=1e-6) and sent.weight == 1.0
        settled = task.chain.settle(sent, NOW).tensors["sums"] - sent.tensors["sums"]
        assert np.std(settled) == pytest.approx(3.0, rel=6 / math.sqrt(2 * settled.size))
    shared = load_state(folder, 1, "")[0].shared
    head = next(v for n, v in shared.items() if "classifier" in n and v.ndim == 2)
    kept = link.method.start(workspace.tunable).kept[LENGTH]
    np.testing.assert_allclose(np.linalg.norm(head, axis=1), TEMPERATURE / kept[0], rtol=1e-3)


def test_noise_that_drowns_the_sums_of_a_few_rows_is_no_reason_to_leave_a_client_out(
    tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    _, result, _ = small.play(
        small.recipe(tiny_bert, data, **BY_ROW | {"method__head_noise": 500.0, "rounds": 1}), tmp_path
    )
    assert result["left_out"] == 0


def test_masked_noisy_sums_add_up(tiny_bert: Path, data: Path, tmp_path: Path) -> None:
    """Noise of each row's, under masks: the same charges, and a head that starts."""
    recipe = small.recipe(tiny_bert, data, **BY_ROW | {"chain": [{"step": "mask"}], "rounds": 1})
    folder, result, _ = small.play(recipe, tmp_path)
    assert result["left_out"] == 0 and {line.draw for line in lines(folder)} == {"0", "0/before"}
    sees = {row.verb: row.sees for row in check(recipe).exposed}[FEATURES]
    assert sees.startswith("the sum only")


def test_a_site_covers_them_with_its_own_noise_and_counts_them(tiny_bert: Path, data: Path) -> None:
    policy = Policy(max_norm=0.5, noise=4.0, max_epsilon=8.0)
    recipe = small.recipe(tiny_bert, data, method__head_start="means", method__head_noise=0.0)
    update, _ = told(recipe)
    done = cover(replace_noise(policy, 0.0), FEATURES, directed=True)
    assert done is not None
    moved = done(update, None)
    assert np.linalg.norm(moved.tensors["sums"]) / moved.weight == pytest.approx(0.5)
    assert release(policy, recipe, FEATURES) == Release("gaussian", "example", 2.0)
    by_row = small.recipe(tiny_bert, data, **BY_ROW)
    assert release(Policy(), by_row, FEATURES) == Release("gaussian", "example", 3.0)
    assert release(Policy(), recipe, FEATURES).mechanism == "none"
    plain = cover(policy, FEATURES)
    with pytest.raises(FedtuneError, match="no difference"):
        plain(update, None)  # type: ignore[misc]


def replace_noise(policy: Policy, sigma: float) -> Policy:
    return policy.model_copy(update={"noise": sigma})


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "ridge": (BY_ROW | {"method__head_start": "ridge"}, "set method.head_start = 'means'"),
    "lda": (BY_ROW | {"method__head_start": "lda"}, "set method.head_start = 'means'"),
    "no noise": (BY_ROW | {"method__head_noise": 0.0}, "method.head_noise = 2.0, or method.head_start"),
    "off": (BY_ROW | {"method__head_noise": "off"}, "method.head_noise = 2.0, or method.head_start"),
    "off under a step": (BY_CLIENT | {"method__head_noise": "off"}, "method.head_noise = 0, or"),
    "of rows, under a step": (BY_CLIENT | {"method__head_noise": 1.0}, "or method.head_noise = 0"),
    "training in the open": (
        {"method__head_start": "means", "method__head_noise": 1.0},
        "training that tells of rows without noise",
    ),
    "no head": (BY_ROW | {"method__head_start": "random"}, "remove method.head_noise"),
}


@pytest.mark.parametrize("name", WRONG)
def test_recipes_that_could_not_keep_the_promise_are_refused(name: str, tiny_bert: Path, data: Path) -> None:
    changes, words = WRONG[name]
    with pytest.raises(FedtuneError) as caught:
        small.recipe(tiny_bert, data, **changes)
    assert caught.value.code == "C104" and words in str(caught.value)

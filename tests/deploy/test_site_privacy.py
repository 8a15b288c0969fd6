"""What a site demands for its own rows is done to every answer, and counted over all of them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from fedtune.cli import main
from fedtune.deploy import worker as working
from fedtune.deploy.policy import Policy, read_policy
from fedtune.deploy.site_privacy import BOOK, book, charge, cover, release
from fedtune.errors import ClientFailed, FedtuneError
from fedtune.privacy.accountant import spent
from fedtune.privacy.releases import Release
from fedtune.runtime.client_half import respond
from fedtune.runtime.protocol import Ask
from fedtune.trust import ticket
from fedtune.types import Round, Update
from fedtune.wire import EVERYONE, decode, encode_state
from tests import small
from tests.hostile.coordinator import Taken, taken
from tests.hostile.test_policy import NOISE, ROWS, read, workspace_of


@pytest.fixture(scope="module")
def hostile(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Taken]:
    with taken(tmp_path_factory.mktemp("taken"), tiny_bert) as made:
        yield made


NEAR = {"a": np.float32([1.0, 2.0]), "b": np.float32([[3.0]])}
SAID = Update.of({"a": np.float32([4.0, 2.0]), "b": np.float32([[7.0]])}, 10.0, {"loss": 1.0})  # 5 apart


def test_what_leaves_is_no_longer_than_the_site_allows() -> None:
    policy = cover(Policy(max_norm=0.5))
    assert policy is not None
    moved = policy(SAID, NEAR).shifted(NEAR, -1)
    values = {name: value / moved.weight for name, value in moved.tensors.items()}
    assert math.sqrt(sum(float(np.vdot(v, v)) for v in values.values())) == pytest.approx(0.5)
    assert moved.metrics and moved.weight == 10.0
    short = Update.of({name: value + np.float32(0.01) for name, value in NEAR.items()}, 10.0)
    for name, value in policy(short, NEAR).tensors.items():
        assert value == pytest.approx(short.tensors[name])
    assert cover(Policy()) is None


def test_noise_of_the_site_is_on_every_number_and_no_loss_beside_it() -> None:
    near = {"a": np.zeros(50_000, np.float32)}
    policy = cover(Policy(max_norm=0.5, noise=2.0))
    assert policy is not None
    covered = policy(Update.of(near, 10.0, {"loss": 1.0}), near)
    assert stats.kstest(covered.tensors["a"] / 10.0, "norm").pvalue > 1e-6 and not covered.metrics


@pytest.mark.parametrize(
    ("update", "near"), [(Update({"pool": np.array([1, 2])}), {"pool": np.array([0, 0])}), (SAID, None)]
)
def test_what_cannot_be_cut_does_not_leave(update: Update, near: Any) -> None:
    policy = cover(Policy(max_norm=0.5))
    assert policy is not None
    with pytest.raises(FedtuneError, match="max_norm") as caught:
        policy(update, near)
    assert caught.value.code == "F507"


def test_an_answer_on_the_wire_is_cut_whatever_the_recipe_says(tiny_bert: Path, tmp_path: Path) -> None:
    recipe = small.recipe(tiny_bert, small.write_rows(tmp_path))
    workspace, link = small.workspace_of(recipe)
    start, now = link.method.start(workspace.tunable).shared, Round(1, recipe.seed, (0,))
    task = link.tasks["train"]
    schema = task.given(workspace.tunable, 0, now)
    ask = Ask(0, "train", now, encode_state(start, link.header("train", EVERYONE, now, schema)))

    def moved(policy: Policy) -> float:
        reply = respond(link, workspace.client_with(0, {}), ask, cover(policy))
        answer = task.answer(schema, now)
        _, said = decode(reply.payload, link.expect("train", 0, now, answer, task.kinds(answer)))
        return math.sqrt(sum(float(np.sum((v - start[n]) ** 2)) for n, v in said.values().items()))

    assert moved(Policy()) > 0.1 and moved(Policy(max_norm=0.01)) == pytest.approx(0.01, rel=1e-3)


def test_the_worker_does_what_its_policy_says_and_writes_it_down(
    hostile: Taken, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The demand is the site's: a recipe with no chain, and a coordinator that asks for the answer again."""
    (tmp_path / "policy.toml").write_text("max_norm = 0.5\nnoise = 8.0\nmax_epsilon = 2.0\n")
    worker = hostile.worker(policy=str(tmp_path / "policy.toml"))
    (worker.home / BOOK).unlink(missing_ok=True)
    asked: list[Any] = []

    def answer(link: Any, client: Any, ask: Any, cover: Any = None) -> Any:
        asked.append(cover)
        raise ClientFailed("W607", "no number", "one", "nothing")

    monkeypatch.setattr(worker.exchange, "fetch", lambda about: b"a state")
    monkeypatch.setattr(working, "respond", answer)
    recipe = hostile.recipe()
    worker.workspace(read(recipe), *workspace_of(worker, recipe))
    base = worker.built[2].base  # type: ignore[index]
    hostile.asks(worker, recipe, base=base)
    assert asked and asked[0] is not None
    one = spent([Release("gaussian", "example", 4.0)], 1e-5).epsilon
    count = 0
    while spent([Release("gaussian", "example", 4.0, count=count + 1)], 1e-5).epsilon <= 2.0:
        count += 1
    assert one < 2.0 and count > 1
    about = ticket.read(hostile.ticket(recipe, run="another-run"), worker.identity)
    for number in range(count):
        asked_then = replace(about, round=number)
        charge(worker.policy, worker.home, read(recipe), asked_then, 0, f"{number}")
        charge(
            worker.policy, worker.home, read(recipe), asked_then, 0, f"{number}"
        )  # the same bytes once more
        charge(worker.policy, worker.home, read(recipe), replace(about, verb="train.keys"), 0, "keys")
    assert len(book(worker.home)) == count
    said = hostile.asks(worker, recipe, base=base, round=2)
    assert said["code"] == "F507" and len(asked) == 1  # over all runs: nothing is left for this one
    (worker.home / BOOK).unlink()


def test_only_noise_that_is_added_here_counts(hostile: Taken) -> None:
    def shown(policy: Policy, verb: str = "train", **changes: Any) -> Release:
        return release(policy, read(hostile.recipe(**changes)), verb)

    nothing = Release("none", "example")
    equal = {"method__weight": "equal"}
    assert shown(Policy()) == nothing
    assert shown(Policy(max_norm=1.0, noise=3.0)) == Release("gaussian", "example", 1.5)
    assert shown(Policy(max_norm=1.0, noise=3.0), "score") == nothing
    assert shown(Policy(), chain=[NOISE], **equal) == Release("gaussian", "example", 2.0)
    assert shown(Policy(), chain=[NOISE | {"place": "coordinator"}], **equal) == nothing
    rows = shown(Policy(), method__train__private=ROWS)
    assert rows == Release("poisson-gaussian", "example", 1.0, 0.1, 2)
    assert shown(Policy(), "features", method__train__private=ROWS) == nothing
    assert shown(Policy(), method__train__private=ROWS | {"noise_multiplier": 0.0}) == nothing


def test_noise_needs_a_length(tmp_path: Path) -> None:
    (tmp_path / "policy.toml").write_text("noise = 1.0\n")
    with pytest.raises(FedtuneError, match=r"noise = 1\.0 without max_norm"):
        read_policy(str(tmp_path / "policy.toml"))


@pytest.mark.parametrize("kind", ["recipe", "ticket"])
def test_a_site_reads_in_words_what_would_leave_it(
    kind: str, hostile: Taken, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "policy.toml").write_text("max_norm = 0.5\nnoise = 4.0\nsums_only = true\n")
    file = tmp_path / kind
    if kind == "ticket":
        file.write_bytes(hostile.ticket(hostile.recipe()))
    else:
        small.write_recipe(file, hostile.model, hostile.rows)
    options = ["--policy", str(tmp_path / "policy.toml"), "--home", str(tmp_path / "home")]
    assert main(["client", "--explain", str(file), *options]) == 0
    page = capsys.readouterr().out
    epsilon = spent([Release("gaussian", "example", 2.0)], 1e-5).epsilon
    for words in (
        "'train'",
        "cut here      to a length of 0.5 (max_norm)",
        "noise here    2 on every number",
        f"epsilon {epsilon:.2f} at delta 1e-05 for each answer",
        "refuses it: F507",
        "(sums_only)",
    ):
        assert words in page, (words, page)
    assert not (tmp_path / "home").exists()


def test_a_client_still_needs_a_coordinator(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["client"]) == 2
    assert "fedtune client without --server" in capsys.readouterr().err

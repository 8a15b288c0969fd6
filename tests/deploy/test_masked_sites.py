"""Masked sums on workers of real keys, over a real exchange: the bytes of a run without masks, whoever is lost or
started again at whatever step."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedtune.deploy import transport
from fedtune.deploy.worker import Worker
from fedtune.errors import ClientFailed, Paused
from fedtune.runtime.journal import Journal
from fedtune.trust import Ticket
from tests import small
from tests.deploy.inside import SITES, FakeGrid, Inside, inside
from tests.marks import mostly_thorough
from tests.runtime.test_masked import losing

pytestmark = pytest.mark.usefixtures("quick")
STEPS = ("train.keys", "train.shares", "train.peers", "train", "train.opening")
ONE = {"rounds": 1, "partition__clients": 3}
MASKED = {**ONE, "chain": [{"step": "mask"}]}


@pytest.fixture(scope="module")
def plain(tiny_bert: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Hashes of runs in this process without masks: of everybody, and without site-c's answer."""
    recipe = small.recipe(tiny_bert, data, **{**ONE, "chain": [{"step": "ring"}]})
    folder = tmp_path_factory.mktemp("plain")
    ends = {name: small.play(recipe, folder / name, carry=losing(lost)) for name, lost in
            (("all", {}), ("two", {"train": {2}}))}  # fmt: skip
    return {name: str(end[1]["state_sha256"]) for name, end in ends.items()}


def end(made: Inside) -> str:
    return str(made.folder.read_json("result.json")["state_sha256"])


class Fails(Worker):
    """A site that cannot do one step, as often as `times` says."""

    step, times = "", 99

    def computed(self, about: Ticket, *more: Any) -> str:
        if (
            about.verb.startswith(self.step)
            and about.verb[len(self.step) :] in ("", ".2", ".3")
            and self.times
        ):
            self.times -= 1
            raise ClientFailed("F503", sentence="the power failed", do="wait")
        return super().computed(about, *more)


def failing(at: str) -> type[Fails]:
    return type("FailsOnce", (Fails,), {"step": at})


@pytest.mark.parametrize("step", mostly_thorough(STEPS, ["train.shares"]))
def test_a_site_lost_at_any_step_leaves_the_sum_of_the_others(
    step: str, tiny_bert: Path, data: Path, tmp_path: Path, plain: dict[str, str]
) -> None:
    """Of three, at the first step nothing is a sum any more; then two are enough."""
    with inside(tmp_path, tiny_bert, data, **MASKED) as made:
        workers = made.workers()
        workers[103] = made.worker(SITES[2], failing(step), partition=True)
        if step == "train.keys":
            with pytest.raises(Paused, match=r"R413: found 2 of 3 members"):
                made.conduct(FakeGrid(workers))
            return
        made.conduct(FakeGrid(workers))
        assert end(made) == plain["all" if step == "train.opening" else "two"]


@pytest.mark.thorough
def test_a_site_that_is_started_again_before_every_step_changes_no_byte(
    tiny_bert: Path, data: Path, tmp_path: Path, plain: dict[str, str]
) -> None:
    with inside(tmp_path, tiny_bert, data, **MASKED) as made:
        workers = made.workers()

        def instead(node: int, message: Any) -> Any:
            if node == 101 and message.metadata.message_type == "train.ticket":
                workers[101] = made.worker(SITES[0])
            return ...

        made.conduct(FakeGrid(workers, instead))
        assert end(made) == plain["all"]
        secrets = list((tmp_path / "home-site-a" / "vault").rglob("*-train-*"))
        assert [path.stat().st_mode & 0o777 for path in secrets] == [0o600]
        assert secrets[0].parent.stat().st_mode & 0o777 == 0o700


@pytest.mark.thorough
def test_a_coordinator_that_dies_after_every_step_changes_no_byte(
    tiny_bert: Path, data: Path, tmp_path: Path, plain: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    dies, ask = list(STEPS), transport.Exchanged.__call__

    def dying(self: transport.Exchanged, asks: Any) -> Iterator[Any]:
        replies = list(ask(self, asks))
        if asks and asks[0].verb in dies:
            dies.remove(asks[0].verb)
            raise KeyboardInterrupt
        yield from replies

    monkeypatch.setattr(transport.Exchanged, "__call__", dying)
    with inside(tmp_path, tiny_bert, data, **MASKED) as made:
        workers = made.workers()
        for _ in STEPS:
            with pytest.raises(KeyboardInterrupt):
                made.conduct(FakeGrid(workers))
        grid = FakeGrid(workers)
        made.conduct(grid)
        assert end(made) == plain["all"] and not [kind for _, kind in grid.pushed if kind == "train.ticket"]
        kept = Journal(made.folder.journal)
        assert [(s.stage, s.attempt, s.members) for _, s in kept.stages()] == [
            (stage, 1, (0, 1, 2)) for stage in ("keys", "shares", "peers", "answers", "opening")
        ]
        kept.close()


@pytest.mark.thorough
def test_a_run_that_paused_for_want_of_members_goes_on_with_fresh_keys(
    tiny_bert: Path, data: Path, tmp_path: Path, plain: dict[str, str]
) -> None:
    with inside(tmp_path, tiny_bert, data, **MASKED) as made:
        workers = made.workers()
        broken = {**workers, 102: made.worker(SITES[1], failing("train.opening"), partition=True)}
        broken[103] = made.worker(SITES[2], failing("train.opening"), partition=True)
        with pytest.raises(Paused, match=r"R413: found 1 of 3 members in round 1.*nothing was opened"):
            made.conduct(FakeGrid(broken))
        made.conduct(FakeGrid(workers))
        assert end(made) == plain["all"]


def test_a_sites_policy_on_verbs_is_about_the_question_and_not_its_steps(
    tiny_bert: Path, data: Path, tmp_path: Path, plain: dict[str, str]
) -> None:
    (tmp_path / "policy.toml").write_text('verbs = ["train"]\nrequire = ["mask"]\n')
    with inside(tmp_path, tiny_bert, data, **MASKED) as made:
        made.conduct(FakeGrid(made.workers(policy=str(tmp_path / "policy.toml"))))
        assert end(made) == plain["all"]

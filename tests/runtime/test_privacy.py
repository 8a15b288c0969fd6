"""A private run: what it costs, when it ends, what a crash leaves, and that without noise it is the plain one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fedtune
from fedtune.config import Recipe
from fedtune.errors import FedtuneError
from fedtune.events import Event, Noted, RoundDone
from fedtune.privacy.accountant import Spent, spent
from fedtune.privacy.releases import Release
from fedtune.runtime import privacy
from fedtune.runtime import run as running
from fedtune.runtime.check import check, rows
from fedtune.runtime.checkpoints import load_state
from fedtune.runtime.journal import Journal
from fedtune.runtime.local import local_transport
from fedtune.runtime.protocol import Ask, Link, Reply
from fedtune.runtime.run import run
from fedtune.runtime.workspace import Workspace
from fedtune.schema import digest
from fedtune.types import Round
from tests import small

LOUD = {"step": "private", "clip": 0.1, "noise_multiplier": 1.0}
MUTE = {"step": "private", "clip": 0.1, "noise_multiplier": 0.0}


def private(model: Path, data: Path, step: dict[str, Any] | None = None, **changes: Any) -> Recipe:
    chain = [step] if step else []
    return small.recipe(model, data, **{"method__weight": "equal", "chain": chain, "rounds": 2} | changes)


def charged(folder: small.RunFolder) -> list[tuple[int, int, str]]:
    journal = Journal(folder.journal)
    found = [(line.round, line.client, line.draw) for line in journal.charges()]
    journal.close()
    return found


def test_without_noise_and_bound_it_is_the_plain_run_to_the_bit(
    tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    nothing = {"step": "private", "clip": 0.0, "noise_multiplier": 0.0}
    plain = small.play(private(tiny_bert, data), tmp_path / "plain")[1]
    found = small.play(private(tiny_bert, data, nothing), tmp_path / "private")[1]
    assert found["state_sha256"] == plain["state_sha256"]
    assert found["epsilon"] is None and "unbounded" in found["privacy"][0]


def test_without_noise_it_is_clipping_to_the_bit(tiny_bert: Path, data: Path, tmp_path: Path) -> None:
    """One round, by hand: float32 differences as they travel, cut, added in float64, divided by their number."""
    recipe = private(tiny_bert, data, MUTE, rounds=1)
    folder, _, _ = small.play(recipe, tmp_path)
    workspace, link = small.workspace_of(recipe)
    start = link.method.start(workspace.tunable).shared
    total = {name: np.zeros(value.shape) for name, value in start.items()}
    long = 0
    for client in range(4):
        said = link.method.verbs["train"].work(
            workspace.client_with(client, {}), start, Round(1, recipe.seed, (0, 1, 2, 3))
        )
        moved = {name: said.tensors[name] - start[name].astype(np.float64) for name in start}
        for _ in range(2):  # at the client; and by the coordinator, once it is rounded to float32
            size = math.sqrt(sum(float(np.vdot(moved[name], moved[name])) for name in sorted(moved)))
            long += size > 0.1
            moved = {name: value * (0.1 / size if size > 0.1 else 1.0) for name, value in moved.items()}
            moved = (
                moved if _ else {name: np.float32(value).astype(np.float64) for name, value in moved.items()}
            )
        for name in total:
            total[name] += moved[name]
    want = {name: np.float32((total[name] + 4.0 * start[name].astype(np.float64)) / 4.0) for name in total}
    assert long >= 4 and digest(load_state(folder, 1, "")[0].shared) == digest(want)


def test_noise_is_of_its_size_and_never_the_same(tiny_bert: Path, data: Path, tmp_path: Path) -> None:
    def state(step: dict[str, Any], where: str) -> np.ndarray:
        folder, _, _ = small.play(private(tiny_bert, data, step, rounds=1), tmp_path / where)
        shared = load_state(folder, 1, "")[0].shared
        return np.concatenate([shared[name].reshape(-1) for name in sorted(shared)]).astype(np.float64)

    mute, one, two = state(MUTE, "mute"), state(LOUD, "one"), state(LOUD, "two")
    for noise in (one - mute, two - mute, (one - two) / math.sqrt(2)):
        assert np.std(noise) == pytest.approx(0.1 / 4, rel=6 / math.sqrt(2 * noise.size))


def test_epsilon_is_what_the_ledger_comes_to(tiny_bert: Path, data: Path, tmp_path: Path) -> None:
    recipe = private(tiny_bert, data, LOUD | {"noise_multiplier": 4.0}, rounds=3, sampling__count=2)
    folder, result, _ = small.play(recipe, tmp_path)
    lines = charged(folder)
    most = max([client for _, client, _ in lines].count(client) for client in range(4))
    assert (
        len(lines) == 6
        and result["epsilon"] == spent([Release("gaussian", "client", 4.0)] * most, 1e-5).epsilon
    )
    assert "hidden: whether one client took part" in result["privacy"][0]
    card = (folder.adapter / "README.md").read_text()
    assert f"differential privacy: {result['privacy'][0]}" in card


def test_a_crash_between_noise_and_commit_charges_once_and_a_round_that_counted_is_not_drawn_again(
    tiny_bert: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = private(tiny_bert, data, LOUD)
    real = running.save_state
    drawn: list[str] = []

    def dies(folder: Any, number: int, state: Any, held: Any) -> str:
        drawn.append(digest(state.shared))
        if len(drawn) == 2:
            raise KeyboardInterrupt
        return real(folder, number, state, held)

    monkeypatch.setattr(running, "save_state", dies)
    with pytest.raises(KeyboardInterrupt):
        small.play(recipe, tmp_path)
    folder = small.RunFolder(tmp_path / "run")
    assert charged(folder) == [(r, c, "0") for r in (1, 2) for c in range(4)]
    told: list[Event] = []
    result = run(recipe, folder, told.append)
    assert [event.round for event in told if isinstance(event, RoundDone)] == [2]
    assert charged(folder) == [(r, c, "0") for r in (1, 2) for c in range(4)]
    assert result["state_sha256"] == drawn[2] != drawn[1]  # round 2 was drawn anew
    assert result["epsilon"] == spent([Release("gaussian", "client", 1.0, count=2)], 1e-5).epsilon


def test_a_rejected_answer_is_charged(tiny_bert: Path, data: Path, tmp_path: Path) -> None:
    def carry(link: Link, workspace: Workspace) -> Any:
        inner = local_transport(link, workspace.client, workspace.done)

        def broken(asks: Sequence[Ask]) -> Any:
            return (Reply(r.client, b"no message") if r.client == 1 else r for r in inner(asks))

        return broken

    folder, result, _ = small.play(private(tiny_bert, data, LOUD), tmp_path, carry=carry)
    assert result["left_out"] == 2 and [c for _, c, _ in charged(folder)].count(1) == 2


def test_the_budget_ends_the_run_before_the_round_that_would_exceed_it(
    tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    one, two, three = (spent([Release("gaussian", "client", 3.0, count=n)], 1e-5).epsilon for n in (1, 2, 3))
    step = LOUD | {"noise_multiplier": 3.0}
    recipe = private(tiny_bert, data, step, rounds=5, privacy={"budget": (two + three) / 2})
    folder, result, events = small.play(recipe, tmp_path)
    assert result["rounds"] == 2 and result["epsilon"] == two
    said = [event.text for event in events if isinstance(event, Noted) and "stopped" in event.text]
    assert said == [
        f"stopped after round 2: found epsilon {three:.2f} at delta 1e-05 after round 3, expected at most "
        f"{(two + three) / 2:g} (privacy.budget)"
    ]
    assert (
        run(recipe, folder, events.append)["rounds"] == 2 and len(charged(folder)) == 8
    )  # once more, unchanged
    assert privacy.affordable(recipe, 4) == 2
    assert any("ends the run after round 2 of 5" in line for line in rows(check(recipe)))
    poor = private(tiny_bert, data, step, privacy={"budget": one / 2})
    with pytest.raises(FedtuneError, match="after round 1, expected at most") as caught:
        small.play(poor, tmp_path / "poor")
    assert caught.value.code == "P902"
    assert any("does not allow one round" in line for line in rows(check(poor)))


def test_what_the_ledger_does_not_know_is_said(tiny_bert: Path, data: Path, tmp_path: Path) -> None:
    recipe = private(tiny_bert, data, LOUD, rounds=1)
    folder, _, _ = small.play(recipe, tmp_path)
    journal = Journal(folder.journal)
    journal.db.execute(
        "INSERT INTO privacy (run, round, client, draw, unit, release) VALUES ('', 1, 2, 'x', 'client', '{}')"
    )
    told = privacy.told(recipe, journal)
    assert told["epsilon"] is None and "epsilon unknown: a release 'unreadable'" in told["privacy"][0]


def test_check_says_whom_epsilon_protects_and_where_it_means_little(tiny_bert: Path, data: Path) -> None:
    lines = [line for line in rows(check(private(tiny_bert, data, LOUD, rounds=10))) if "privacy" in line]
    epsilon = spent([Release("gaussian", "client", 1.0, count=10)], 1e-5).epsilon
    assert f"epsilon {epsilon:.2f} at delta 1e-05 after 10 rounds; hidden: whether one client" in lines[0]
    assert any("meaningless with 4 clients" in line for line in lines)
    assert any("an epsilon above 10" in line for line in lines)
    many = private(tiny_bert, data, LOUD | {"noise_multiplier": 8.0}, partition__clients=40, rounds=3)
    assert not any("meaningless" in line for line in rows(check(many)))


def test_doubts_are_about_clients_noise_and_delta(tiny_bert: Path, data: Path) -> None:
    """The noise in a mean of 4 answers of 10,000 numbers: 8 sqrt(10,000) / 4 of the longest mean; at clients
    each adds its own, twice as much."""
    loud = LOUD | {"noise_multiplier": 8.0}

    def said(
        spent_epsilon: float, clients: int = 4, step: dict[str, Any] = loud, **changes: Any
    ) -> list[str]:
        known = Spent(1e-5, spent_epsilon, spent_epsilon)
        return privacy.doubts(private(tiny_bert, data, step, **changes), clients, 10_000, known)

    assert "is 200 times as long as the longest mean can be (4 clients, 10,000 numbers)" in said(1.0)[0]
    assert "is 400 times" in said(1.0, step=loud | {"place": "client"})[0]
    assert "is 25 times" in said(1.0, clients=32)[0] and len(said(1.0, clients=32)) == 1
    assert len(said(10.0, clients=30)) == 1 and "an epsilon above 10" in said(10.1, clients=30)[1]
    assert "meaningless with 29 clients" in said(1.0, clients=29)[1]
    wide = said(1.0, clients=50, privacy={"delta": 0.02})
    assert len(wide) == 2 and "a delta of 0.02 allows that one of 50 clients is shown whole" in wide[1]
    assert len(said(1.0, clients=49, privacy={"delta": 0.02})) == 1


def test_unknown_is_the_most_that_can_be_given_away() -> None:
    known, more, unknown = (Spent(1e-5, value, value) for value in (1.0, 2.0, math.nan))
    assert privacy.worst({"row": known, "client": more}) is more
    assert privacy.worst({"row": unknown, "client": more}) is unknown
    assert privacy.worst({"row": more, "client": unknown}) is unknown


def test_epsilon_by_round_grows_and_is_nothing_for_others(
    tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    assert privacy.epsilon_by_round(small.RunFolder(tmp_path)) == {}
    folder = small.RunFolder(tmp_path)
    folder.begin(private(tiny_bert, data, LOUD, rounds=2))
    journal = Journal(folder.journal)
    for number in (1, 2):
        journal.charge(privacy.charges(private(tiny_bert, data, LOUD), number, [0, 1]))
        journal.commit(number, f"s{number}", "f", 0.1, {}, [])
    journal.close()
    one, two = (spent([Release("gaussian", "client", 1.0, count=n)], 1e-5).renyi for n in (1, 2))
    found = privacy.epsilon_by_round(folder)["client"]
    assert found == [(1, pytest.approx(one)), (2, pytest.approx(two))]
    folder.begin(private(tiny_bert, data))
    assert privacy.epsilon_by_round(folder) == {}


def test_a_private_run_cannot_be_replayed_without_a_member(
    tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    folder, _, _ = small.play(private(tiny_bert, data, LOUD, rounds=1), tmp_path)
    with pytest.raises(FedtuneError, match="whose noise nobody can draw again") as caught:
        fedtune.forget(folder.path, ["client-1"])
    assert caught.value.code == "C104"


def test_the_exposure_table_says_what_noise_covers(tiny_bert: Path, data: Path) -> None:
    def sees(step: dict[str, Any]) -> dict[str, str]:
        return {row.verb: row.sees for row in check(private(tiny_bert, data, step)).exposed}

    at_sum, at_client = sees(LOUD), sees(LOUD | {"place": "client"})
    assert (
        "each client's answer as it passes, uses the sum only, cut to a length of 0.1; before it is"
        in at_sum["train"]
    )
    assert "with noise of 0.1 on every number" in at_client["train"]
    assert "loss" not in at_sum["figures"] and "loss" in sees({"step": "sign"})["figures"]


def test_the_report_draws_epsilon_by_round(tiny_bert: Path, data: Path, tmp_path: Path) -> None:
    from fedtune.report.curves import privacy as drawn
    from fedtune.report.picture import LIGHT
    from fedtune.report.read import read_run
    from fedtune.report.write import groups_of

    folder, result, _ = small.play(private(tiny_bert, data, LOUD, rounds=3), tmp_path)
    (chart,) = drawn(groups_of([read_run(folder)]))
    assert [row[0] for row in chart.rows] == ["1", "2", "3"]
    assert float(chart.rows[-1][1]) == pytest.approx(
        spent([Release("gaussian", "client", 1.0, count=3)], 1e-5).renyi, rel=1e-2
    )
    assert float(chart.rows[-1][1]) >= result["epsilon"] and "by Renyi divergences" in chart.about
    chart.draw(LIGHT)
    plain, _, _ = small.play(private(tiny_bert, data), tmp_path / "plain")
    assert not list(drawn(groups_of([read_run(plain)])))

"""A run without a member ends with the bytes of one in which it never took part: of one that leaves it out from
the start, and of one in which it is asked and never answers."""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

import fedtune
from fedtune.cli import main
from fedtune.config import Recipe
from fedtune.errors import ClientFailed, FedtuneError
from fedtune.events import Noted, RoundDone
from fedtune.rng import stream
from fedtune.runtime.folder import RunFolder
from fedtune.runtime.forget import Record, plan
from fedtune.runtime.journal import chain
from fedtune.runtime.local import local_transport
from fedtune.runtime.protocol import Ask, Link, Reply, Transport
from fedtune.runtime.sampling import sample
from fedtune.runtime.workspace import Workspace
from fedtune.trust.authority import create
from fedtune.trust.certificates import utc_now
from fedtune.trust.signed import Signed, check
from tests import small
from tests.conformance.recipes import METHODS

VARIANTS = [
    "fedpeft-lora",
    "fedpeft-adam",
    "fedpeft-both-ways",
    "fedpeft-fedsa",
    "fedpeft-lda",
    "fedkseed-fzoo",
    "fedkseed-pool",
    "sfprompt-slim",
    "experts-clients",
]
CLIENTS = 5
HOW_OFTEN = {0: (), 1: pytest.mark.thorough, 2: pytest.mark.thorough}  # the others are slow


def pairs(count: int) -> list[tuple[str, int, int, int]]:
    """Method, member, rounds and seed, at random: from the seed follows when the member is first asked."""
    draw = stream("whom to forget", 0)
    return [
        (
            VARIANTS[number % len(VARIANTS)],
            *map(int, (draw.integers(CLIENTS), draw.integers(2, 6), draw.integers(99))),
        )
        for number in range(count)
    ]


def mute(silent: int) -> Any:
    """A local transport in which one client never answers."""

    def carry(link: Link, workspace: Workspace) -> Transport:
        real = local_transport(link, workspace.client, workspace.done)

        def asked(asks: Sequence[Ask]) -> Iterator[Reply]:
            yield from real([ask for ask in asks if ask.client != silent])
            lost = ClientFailed("F503", sentence="it is gone", do="nothing")
            yield from (Reply(ask.client, failure=lost) for ask in asks if ask.client == silent)

        return asked

    return carry


def recipe_for(name: str, rounds: int, seed: int, model: Path, data: Path, **more: Any) -> Recipe:
    changes: dict[str, Any] = {"partition": {"by": "iid", "clients": CLIENTS}, "sampling": {"count": 3}}
    return small.recipe(model, data, **{**METHODS[name], **changes, "rounds": rounds, "seed": seed, **more})


@pytest.mark.parametrize(
    ("name", "member", "rounds", "seed"),
    [pytest.param(*pair, marks=HOW_OFTEN.get(n, pytest.mark.slow)) for n, pair in enumerate(pairs(20))],
)
def test_twenty_members_at_random_are_forgotten_to_the_bit(
    name: str, member: int, rounds: int, seed: int, tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    recipe = recipe_for(name, rounds, seed, tiny_bert, data)
    folder, before, _ = small.play(recipe, tmp_path / "with")
    done = fedtune.forget(folder.path, [f"client-{member}"])
    _, silent, _ = small.play(recipe, tmp_path / "silent", carry=mute(member))
    left_out = recipe.sampling.model_copy(update={"without": (f"client-{member}",)})
    _, absent, _ = small.play(recipe.model_copy(update={"sampling": left_out}), tmp_path / "absent")
    assert done.result["state_sha256"] == absent["state_sha256"] == silent["state_sha256"]
    asked = any(answer.client == member for _, answer in Record.of(folder).answers)
    assert (done.result["state_sha256"] != before["state_sha256"]) == asked
    assert done.folder == folder.path.with_name(f"run-without-client-{member}")
    assert Record.of(RunFolder(done.folder)).rounds[-1].number == rounds


@pytest.fixture(scope="module")
def late(tiny_bert: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run in which client 1 is first asked in the fourth round of four, with memories and a coded way down."""
    recipe = recipe_for("fedpeft-both-ways", 4, 3, tiny_bert, data, sampling={"count": 2})
    for seed in range(200):
        folder_of_seed = recipe.model_copy(update={"seed": seed})
        if first_asked(folder_of_seed, 1) == 4:
            return small.play(folder_of_seed, tmp_path_factory.mktemp("late"))[0]
    raise AssertionError("no such seed")


def first_asked(recipe: Recipe, member: int) -> int:
    rounds = range(1, recipe.rounds + 1)
    return next((n for n in rounds if member in sample(recipe.sampling, CLIENTS, recipe.seed, n)), 0)


def test_stored_states_save_the_rounds_before_a_member_was_first_asked(
    late: RunFolder, tmp_path: Path
) -> None:
    told: list[Any] = []
    done = fedtune.forget(late.path, ["client-1"], tmp_path / "new", on_event=told.append)
    assert [event.round for event in told if isinstance(event, RoundDone)] == [4]
    said = json.loads(done.certificate.read_text())
    assert (said["first_round_asked"], said["rounds_kept"], said["rounds_compared"]) == (4, 3, 0)
    late.state(3).rename(tmp_path / "kept")
    try:
        whole = fedtune.forget(late.path, ["client-1"], tmp_path / "whole")
    finally:
        (tmp_path / "kept").rename(late.state(3))
    said = json.loads(whole.certificate.read_text())
    assert (said["rounds_kept"], said["rounds_compared"]) == (0, 3)
    assert whole.result["state_sha256"] == done.result["state_sha256"] == said["state_after"]
    assert said["state_before"] == Record.of(late).rounds[-1].state_sha256


def test_the_cost_is_said_beforehand(late: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["forget", str(late.path), "--client", "client-1", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert (
        "client-1: first asked in round 4 of 4" in said and "replay 1 rounds; rounds 1 to 3 are kept" in said
    )
    cost = plan(late, ["client-1"])
    (other,) = cost.asked
    assert cost.asked[other] == 1 and f"1 members answer 1 times: {other}" in said
    assert not late.path.with_name("run-without-client-1").exists()
    answers = [a for n, a in Record.of(late).answers if n == 4 and a.client != 1]
    assert (cost.up, cost.down) == (answers[0].up_bytes, answers[0].down_bytes)


def test_a_member_that_was_never_asked_costs_nothing(tiny_bert: Path, data: Path, tmp_path: Path) -> None:
    recipe = recipe_for("fedpeft-lora", 2, 0, tiny_bert, data, sampling={"count": 1})
    folder, before, _ = small.play(recipe, tmp_path)
    name = next(f"client-{n}" for n in range(CLIENTS) if not first_asked(recipe, n))
    assert plan(folder, [name]).told() == [
        f"{name}: never asked in this run; nothing has to be computed again"
    ]
    done = fedtune.forget(folder.path, [name])
    assert done.result["state_sha256"] == before["state_sha256"]
    assert Record.of(RunFolder(done.folder)).rounds == Record.of(folder).rounds


def test_a_round_that_falls_to_nobody_else_changes_nothing(
    tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    recipe = recipe_for("fedpeft-lora", 3, 1, tiny_bert, data, sampling={"count": 1})
    folder, _, _ = small.play(recipe, tmp_path)
    member = Record.of(folder).answers[1][1].client
    told: list[Any] = []
    done = fedtune.forget(folder.path, [f"client-{member}"], on_event=told.append)
    record = Record.of(RunFolder(done.folder))
    assert record.rounds[1].state_sha256 == record.rounds[0].state_sha256
    assert record.rounds[1].metrics == {"skipped": 1.0}
    assert any(isinstance(event, Noted) and "round 2 changes nothing" in event.text for event in told)


def test_a_replay_that_was_cut_off_goes_on(late: RunFolder, tmp_path: Path) -> None:
    class Cut(Exception): ...

    def cut(event: Any) -> None:
        if isinstance(event, RoundDone) and event.round == 2:
            raise Cut

    member = Record.of(late).answers[0][1].client
    with pytest.raises(Cut):
        fedtune.forget(late.path, [f"client-{member}"], tmp_path / "new", on_event=cut)
    told: list[Any] = []
    done = fedtune.forget(late.path, [f"client-{member}"], tmp_path / "new", on_event=told.append)
    assert [event.round for event in told if isinstance(event, RoundDone)] == [3, 4]
    whole = fedtune.forget(late.path, [f"client-{member}"], tmp_path / "whole")
    assert done.result["state_sha256"] == whole.result["state_sha256"]
    with pytest.raises(FedtuneError, match="R401"):
        fedtune.forget(late.path, ["client-1"], tmp_path / "new")


def test_nothing_of_a_forgotten_member_chooses_or_scores(tiny_bert: Path, data: Path, tmp_path: Path) -> None:
    """Its held-out rows are in no score, so that the best round and the end are those of the others."""
    chosen = {"test_share": 0.0, "client_test_share": 0.25}
    recipe = recipe_for("fedpeft-lora", 3, 1, tiny_bert, data, evaluate__every=1, evaluate__local=True)
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update=chosen)})
    folder, result, _ = small.play(recipe, tmp_path)
    done = fedtune.forget(folder.path, ["client-2"])
    assert json.loads(done.certificate.read_text())["rounds_kept"] == 0
    assert (result["clients"], done.result["clients"]) == (5, 4)
    assert (result["per_client"]["clients"], done.result["per_client"]["clients"]) == (5, 4)
    assert done.result["local"] is not None and done.result["phases"]["clients_metric"].keys() == {
        f"client-{number}" for number in range(CLIENTS) if number != 2
    }


def test_a_member_may_sign_the_certificate(late: RunFolder, tmp_path: Path) -> None:
    authority = create(tmp_path / "keys", "hospitals", ["localhost"], 30)
    keys = authority.place("coordinator")
    done = fedtune.forget(late.path, ["client-1"], tmp_path / "new", keys=keys)
    signed = Signed.from_json(done.certificate.read_bytes())
    check(signed, authority.certificate, utc_now() + timedelta(days=1), "certificate")
    said = json.loads(signed.record)
    assert said["clients"] == ["client-1"] and said["state_after"] == done.result["state_sha256"]
    assert datetime.fromisoformat(said["when"]) <= datetime.now(UTC)


def test_what_cannot_be_forgotten_is_refused(late: RunFolder, data: Path, tmp_path: Path) -> None:
    with pytest.raises(FedtuneError, match="C103: found client 'nobody'"):
        fedtune.forget(late.path, ["nobody"])
    with pytest.raises(FedtuneError, match="C103: found every client of the run"):
        fedtune.forget(late.path, [f"client-{number}" for number in range(CLIENTS)])
    rows = data.read_text()
    data.write_text(rows + rows.splitlines()[0] + "\n")
    try:
        with pytest.raises(FedtuneError, match="R406: found data that have changed"):
            fedtune.forget(late.path, ["client-1"], tmp_path / "new")
    finally:
        data.write_text(rows)


def test_bytes_that_this_machine_cannot_repeat_are_no_certificate(
    late: RunFolder, tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    """Here, a journal that says of a round what another processor may have computed."""
    copy = RunFolder(Path(shutil.copytree(late.path, tmp_path / "copy")))
    db, link = sqlite3.connect(copy.journal), ""
    for row in Record.of(late).rounds:
        state = "0" * 64 if row.number == 2 else row.state_sha256
        link = chain(link, row.number, state)
        db.execute("UPDATE rounds SET state_sha256 = ?, link = ? WHERE number = ?", (state, link, row.number))
    db.commit()
    db.close()
    copy.state(3).unlink()
    with pytest.raises(FedtuneError, match="R421: found round 2 with state"):
        fedtune.forget(copy.path, ["client-1"])
    assert not list(tmp_path.glob("copy-without-client-1/forgotten/*"))


def test_a_run_on_real_sites_is_refused_with_who_must_answer(late: RunFolder, tmp_path: Path) -> None:
    copy = RunFolder(Path(shutil.copytree(late.path, tmp_path / "copy")))
    tree = copy.read_json("config.json")
    tree["deploy"]["sites"] = [f"client-{number}" for number in range(CLIENTS)]
    copy.write_json("config.json", tree)
    copy.write_json("deploy.json", {})
    other = next(a.client for n, a in Record.of(late).answers if n == 4 and a.client != 1)
    with pytest.raises(FedtuneError, match=rf"C104: found a run on real sites, client-{other} of which"):
        fedtune.forget(copy.path, ["client-1"])


def test_a_name_that_is_nobodys_is_no_reason_to_leave_somebody_out(tiny_bert: Path, data: Path) -> None:
    recipe = small.recipe(tiny_bert, data, sampling__without=["nobody"])
    with pytest.raises(FedtuneError, match=r"C104: found 'nobody' in sampling\.without"):
        small.workspace_of(recipe)

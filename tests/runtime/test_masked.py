"""Runs under masks: the bytes of the same run without them, whoever is lost at whatever step, and closed where too
few come through."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedtune.errors import ClientFailed, FedtuneError, Paused
from fedtune.events import ClientLeftOut, Noted, RoundDone
from fedtune.runtime.check import check, rows
from fedtune.runtime.journal import Journal
from fedtune.runtime.local import local_transport
from fedtune.runtime.protocol import Ask, Link, Reply, Transport
from fedtune.runtime.workspace import Workspace
from fedtune.wire.frame import opened
from tests import small
from tests.marks import mostly_thorough

RING, MASK = [{"step": "ring"}], [{"step": "mask"}]
FIVE = {"partition__clients": 5, "rounds": 2}
POOL = {
    "type": "fedkseed",
    "size": 64,
    "steps": 2,
    "batch": 4,
    "lr": 1e-3,
    "estimator": "spsa",
    "uplink": "pool",
}
Lost = dict[str, set[int]]  # verb -> members whose answers to it are lost in round 1


def losing(lost: Lost, seen: list[tuple[Ask, Reply]] | None = None) -> Callable[[Link, Workspace], Transport]:
    """The local transport, over which some answers are lost; what passes is put into `seen`."""

    def carry(link: Link, workspace: Workspace) -> Transport:
        real = local_transport(link, workspace.client, workspace.done)

        def transport(asks: Sequence[Ask]) -> Iterator[Reply]:
            for ask, reply in zip(asks, real(asks), strict=True):
                if ask.now.number == 1 and ask.client in lost.get(ask.verb, ()):
                    yield Reply(
                        ask.client, failure=ClientFailed("F503", sentence="the line broke", do="wait")
                    )
                else:
                    if seen is not None:
                        seen.append((ask, reply))
                    yield reply

        return transport

    return carry


def end(
    model: Path, data: Path, root: Path, lost: Lost | None = None, **changes: Any
) -> tuple[str, list[Any]]:
    recipe = small.recipe(model, data, **{**FIVE, **changes})
    _, result, events = small.play(recipe, root, carry=losing(lost or {}))
    return str(result["state_sha256"]), events


@pytest.mark.parametrize(
    ("step", "method"),
    mostly_thorough(
        [
            ("train.keys", {}),
            ("train.shares", {}),
            ("train.peers", {"method": POOL}),
            ("train", {}),
            ("train", {"method": POOL}),
            ("train.opening", {}),
        ],
        [("train.shares", {}), ("train", {"method": POOL})],
    ),
)
def test_a_member_lost_at_any_step_leaves_the_plain_sum_of_the_others(
    step: str, method: dict[str, Any], tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    masked, events = end(tiny_bert, data, tmp_path / "m", {step: {3}}, chain=MASK, **method)
    plain, others = end(
        tiny_bert,
        data,
        tmp_path / "p",
        {} if step == "train.opening" else {"train": {3}},
        chain=RING,
        **method,
    )
    assert masked == plain
    done = [event for event in events if isinstance(event, RoundDone)]
    assert [event.left_out for event in done] == [int(step != "train.opening"), 0]
    figures = [event.metrics for event in events + others if isinstance(event, RoundDone)]
    assert (
        figures[0] == figures[2] and "loss" in figures[0]
    )  # the mean loss too, of which no single one was seen
    kept = Journal(tmp_path / "m" / "run" / "journal.db")
    stages = {(number, s.verb, s.attempt, s.stage): s.members for number, s in kept.stages()}
    kept.close()
    for stage in ("keys", "shares", "peers", "answers", "opening"):
        assert stages[2, "train", 1, stage] == (0, 1, 2, 3, 4)
    assert 3 not in stages[1, "train", 1, "opening"]


def test_no_weight_loss_or_number_of_one_member_passes_and_no_secret_is_remembered(
    tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    seen: list[tuple[Ask, Reply]] = []
    worlds: list[Workspace] = []

    def carry(link: Link, workspace: Workspace) -> Transport:
        worlds.append(workspace)
        return losing({}, seen)(link, workspace)

    recipe = small.recipe(tiny_bert, data, chain=MASK, method__head_start="lda", **FIVE)
    small.play(recipe, tmp_path, carry=carry)
    verbs = {ask.verb for ask, _ in seen}
    assert verbs == {
        f"{v}{s}" for v in ("train", "features") for s in ("", ".keys", ".shares", ".peers", ".opening")
    }
    for ask, reply in seen:
        message, payload = opened(reply.payload)
        assert message.weight == 1.0 and not message.metrics and not reply.said
        if ask.verb in ("train", "features"):  # bytes of a stream: every value of a byte, about as often
            counts = np.bincount(np.frombuffer(payload, np.uint8), minlength=256)
            assert counts.min() > 0.3 * counts.mean() and counts.max() < 2 * counts.mean()
    assert not any(worlds[0].client_states.held.values())
    sessions = {name for vault in worlds[0].vaults.values() for name in vault.names()}
    assert sessions == {f"{recipe.fingerprint[:16]}-2-train-1"}  # of the last round: those before are gone


def test_a_sum_that_too_few_came_through_is_begun_anew_with_fresh_keys(
    tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    """Of the first attempt everybody answered, and nobody opened; of the second half are lost."""
    everyone = set(range(5))
    lost = {"train.opening": everyone, "train.shares.2": {0, 1}}
    seen: list[tuple[Ask, Reply]] = []
    recipe = small.recipe(tiny_bert, data, chain=MASK, aggregate__rule="fedsa", **FIVE)
    _, result, events = small.play(recipe, tmp_path / "m", carry=losing(lost, seen))
    plain = small.play(
        small.recipe(tiny_bert, data, chain=RING, aggregate__rule="fedsa", **FIVE), tmp_path / "p"
    )
    assert result["state_sha256"] == plain[1]["state_sha256"]
    said = [event.text for event in events if isinstance(event, Noted)]
    assert [text.partition("; ")[2] for text in said] == ["it is begun anew, with fresh keys"] * 2
    answers = [
        reply.payload for ask, reply in seen if ask.client == 0 and ask.now.number == 1 and ".k" in ask.verb
    ]
    keys = [bytes(opened(payload)[1]) for payload in answers]
    assert len(keys) == len(set(keys)) == 3


def test_a_sum_that_fails_three_times_fails_closed(tiny_bert: Path, data: Path, tmp_path: Path) -> None:
    lost = {f"train.opening{n}": {0, 1} for n in ("", ".2", ".3")}
    with pytest.raises(Paused, match=r"R413.*3 of 5 members in round 1.*nothing was opened"):
        end(tiny_bert, data, tmp_path, lost, chain=MASK)


def test_groups_have_sums_of_their_own_and_none_of_two(tiny_bert: Path, data: Path, tmp_path: Path) -> None:
    def experts(groups: list[str], least: int = 3) -> dict[str, Any]:
        table = {"by": "given", "groups": groups, "warm_up": 1, "min_clients": least}
        return {"method__type": "experts", "method__experts": table, "partition__clients": 6}

    six = experts(["a", "b", "b", "a", "b", "a"])
    lost: Lost = {"specialise": {3}, "specialise.opening": {1}}
    masked, _ = end(tiny_bert, data, tmp_path / "m", lost, chain=MASK, **six)
    plain, _ = end(tiny_bert, data, tmp_path / "p", {"specialise": {3}}, chain=RING, **six)
    assert masked == plain
    with pytest.raises(FedtuneError, match=r"min_clients = 2.*3 or more"):
        small.recipe(tiny_bert, data, chain=MASK, **{**FIVE, **experts(["a", "b", "b", "a", "b"], 2)})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"chain": [{"step": "ternary"}, *MASK]}, "'ternary' beside 'mask'.*step 'ring'; remove 'ternary'"),
        ({"chain": [*MASK, {"step": "sign"}]}, "'sign' beside 'mask'"),
        ({"chain": [*MASK, *RING]}, "'ring' after a step that gives ring numbers"),
        ({"aggregate": {"rule": "median"}}, "reads single answers.*rule that needs the sum only: .*mean"),
        ({"aggregate": {"rule": "flexlora"}}, "reads single answers"),
        ({"aggregate": {"rule": "krum", "faulty": 0}}, "reads single answers"),
        ({"limits": {"norm": 1.0}}, "no answer's norm can be seen.*clip"),
        ({"partition": {"by": "iid", "clients": 2}}, "2 clients a round.*3 or more"),
        ({"sampling": {"count": 2}}, "2 clients a round"),
        ({"method": {**POOL, "uplink": "steps"}}, "set method.uplink = 'pool'"),
        ({"chain": [{"step": "mask", "threshold": 0.5}]}, "threshold"),
    ],
)
def test_what_a_mask_cannot_stand_beside_is_refused_with_what_would_do(
    changes: dict[str, Any], words: str, tiny_bert: Path, data: Path
) -> None:
    with pytest.raises(FedtuneError, match=words):
        small.recipe(tiny_bert, data, **{"chain": MASK, **changes})


def test_a_client_without_the_keys_of_a_sum_is_left_out(tiny_bert: Path, data: Path, tmp_path: Path) -> None:
    """Started again in the middle of a round, with a vault that is empty."""

    def carry(link: Link, workspace: Workspace) -> Transport:
        real = local_transport(link, workspace.client, workspace.done)

        def transport(asks: Sequence[Ask]) -> Iterator[Reply]:
            for ask in asks:
                if (ask.verb, ask.client, ask.now.number) == ("train", 2, 1):
                    workspace.vaults.pop(2)
                yield from real([ask])

        return transport

    recipe = small.recipe(tiny_bert, data, chain=MASK, **FIVE)
    _, result, events = small.play(recipe, tmp_path / "m", carry=carry)
    assert [e.code for e in events if isinstance(e, ClientLeftOut)] == ["W608"]
    assert result["state_sha256"] == end(tiny_bert, data, tmp_path / "p", {"train": {2}}, chain=RING)[0]


def test_check_says_who_sees_what_and_how_many_bytes_it_takes(
    tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    for chain, method in ((MASK, {}), (RING, {}), (MASK, {"method": POOL})):
        recipe = small.recipe(tiny_bert, data, **{**FIVE, "chain": chain, "rounds": 1, **method})
        checked = check(recipe)
        folder, _, _ = small.play(recipe, tmp_path / f"{chain}{len(method)}")
        kept = Journal(folder.journal)
        said = [(answer.up_bytes, answer.down_bytes) for _, answer in kept.answers() if answer.client]
        kept.close()
        assert len(said) == 4  # protobuf leaves out the number of client 0
        for up, down in said:
            assert up == pytest.approx(checked.up_bytes, abs=16)
            assert down <= checked.down_bytes + 16  # a state of zeros takes less, as changes
        lines = rows(checked)
        server = next(line for line in lines if line.startswith("server    verb 'train'"))
        if chain is MASK:
            assert "sees the sum only; through ring > mask" in server
            assert any(line.startswith("masks     who came through which step") for line in lines)
            assert any(
                line.startswith("figures   of masked answers, as sums over members only") for line in lines
            )
        else:
            assert "sees each client's answer as it passes, uses the sum only; through ring" in server

"""A run on workers of its own process: bytes, quorum, what each site says no to, and what a restart finds
again."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file, save_file

from fedtune.deploy.worker import WorkspaceBuilt
from fedtune.errors import FedtuneError, Paused
from fedtune.events import Noted
from tests import small
from tests.deploy.conducting import notes, outcomes
from tests.deploy.inside import SITES, FakeGrid, inside
from tests.e2e.deploying import MEMORY, lines_of, local
from tests.e2e.test_flower import journal

pytestmark = pytest.mark.usefixtures("quick")


def test_a_run_on_workers_has_the_bytes_and_the_journal_of_a_local_run(
    tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    with inside(tmp_path, tiny_bert, data, **MEMORY) as made:
        made.conduct(FakeGrid(made.workers()))
        alone, result = local(tmp_path / "local", tiny_bert, data, **MEMORY)
        assert made.folder.read_json("result.json")["state_sha256"] == result["state_sha256"]
        assert journal(made.folder) == journal(alone)
        assert all([type(e) for e in made.told[site]].count(WorkspaceBuilt) == 1 for site in SITES)
        assert not list(made.server_store.store.objects.iterdir())  # all rounds are over: nothing is kept


def test_below_the_quorum_the_run_pauses_and_resume_takes_what_was_accepted(
    tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    changes = {"deploy__quorum": 1.0, "deploy__deadline": 4.0, **MEMORY}
    with inside(tmp_path, tiny_bert, data, **changes) as made:
        two = {node: worker for node, worker in made.workers().items() if node != 103}
        with pytest.raises(
            Paused,
            match=r"R409: found 2 usable answers in round 1 \(missing: client-2\), expected 3 "
            r"\(deploy.quorum\).*fedtune resume",
        ):
            made.conduct(FakeGrid(two))
        failed = made.folder.read_json("failed.json")
        assert (failed["code"], failed["exit_code"]) == ("R409", 75) and not outcomes(made.folder)
        everybody = FakeGrid(made.workers())
        made.conduct(everybody)
        assert (
            everybody.pushed.count((101, "train.ticket")) == 2
            and everybody.pushed.count((103, "train.ticket")) == 3
        )  # of round 1, only the third was asked
        assert (
            made.folder.read_json("result.json")["state_sha256"]
            == local(tmp_path / "local", tiny_bert, data, **MEMORY)[1]["state_sha256"]
        )
        assert not (made.folder.path / "failed.json").exists()


def test_a_site_whose_policy_forbids_the_method_is_left_out_with_its_own_words(
    tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    (tmp_path / "policy.toml").write_text('methods = ["fedkseed"]\n')
    with inside(tmp_path, tiny_bert, data, rounds=1, **MEMORY) as made:
        workers = made.workers() | {103: made.worker("site-c", policy=str(tmp_path / "policy.toml"))}
        made.conduct(FakeGrid(workers))
        assert outcomes(made.folder) == {(1, 0): "ok", (1, 1): "ok", (1, 2): "F507"}
        assert (
            ": at 'site-c', number " in notes(made.folder)[0]
            and "ask the operator of 'site-c'" in notes(made.folder)[0]
        )
        assert any(
            "found method 'fedpeft', expected one of fedkseed" in e.text
            for e in made.told["site-c"]
            if isinstance(e, Noted)
        )  # its own terminal


def test_a_site_with_another_base_model_trains_nothing(tiny_bert: Path, data: Path, tmp_path: Path) -> None:
    other = shutil.copytree(tiny_bert, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    weights["embeddings.word_embeddings.weight"][0, 0] += 1
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    with inside(tmp_path, tiny_bert, data, rounds=1, **MEMORY) as made:
        made.conduct(FakeGrid(made.workers() | {102: made.worker("site-b", model=str(other))}))
        assert outcomes(made.folder)[1, 1] == "W604" and any(
            "base model" in e.text and "--model" in e.text
            for e in made.told["site-b"]
            if isinstance(e, Noted)
        )


def test_the_run_is_known_again_by_its_folder_only_with_its_own_recipe(
    tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    from fedtune.deploy.server import begin

    with inside(tmp_path, tiny_bert, data, **MEMORY) as made:
        same = {"partition__clients": 3, "deploy__data": "partition", **MEMORY}
        again = begin(small.recipe(tiny_bert, data, **same), "run", tmp_path / "runs", made.keys, "x:1")
        assert again.read_json("deploy.json")["run"] == made.run
        with pytest.raises(FedtuneError, match=r"R406: found a run .* that was started with another recipe"):
            begin(small.recipe(tiny_bert, data, **same, rounds=9), "run", tmp_path / "runs", made.keys, "x:1")


def test_events_say_who_was_not_let_in(tiny_bert: Path, data: Path, tmp_path: Path) -> None:
    """A worker whose key was revoked greets like everybody else and is told apart by its signature."""
    from fedtune.trust.authority import revoke

    with inside(tmp_path, tiny_bert, data, rounds=1, deploy__deadline=3.0, **MEMORY) as made:
        revoke(made.keys, "site-b")
        made.conduct(FakeGrid(made.workers()))
        assert outcomes(made.folder) == {(1, 0): "ok", (1, 1): "T706", (1, 2): "ok"}
        said = [e["text"] for e in lines_of(made.folder.path / "events.jsonl") if e["event"] == "Noted"]
        assert any(text.startswith("node 102 is not let in. T706") for text in said)


def test_one_process_too_many_leaves_the_run_alone(tiny_bert: Path, data: Path, tmp_path: Path) -> None:
    """A slow submission was taken for lost, and now there are two."""
    with inside(tmp_path, tiny_bert, data, rounds=1, **MEMORY) as made:
        with made.folder.locked(), pytest.raises(FedtuneError, match="R407"):
            made.conduct(FakeGrid(made.workers()))
        assert not (made.folder.path / "failed.json").exists()


def test_a_defect_leaves_its_traceback_in_the_runs_folder(
    tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    with inside(tmp_path, tiny_bert, data, rounds=1, **MEMORY) as made:

        def broken(node: int, message: Any) -> Any:
            raise ZeroDivisionError("a defect")

        with pytest.raises(ZeroDivisionError):
            made.conduct(FakeGrid(made.workers(), broken))
        assert (
            "ZeroDivisionError: a defect" in (made.folder.path / "crash.log").read_text()
            and not (made.folder.path / "failed.json").exists()
        )

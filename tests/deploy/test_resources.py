"""A site that has no room says so before it loads anything."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from fedtune.deploy.resources import require_disk, require_memory, require_room
from fedtune.errors import ClientFailed, FedtuneError
from fedtune.model import hardware
from fedtune.trust import Ticket
from tests import small

ABOUT = Ticket("run", 1, "site-a", "train", "", "b" * 64, "c" * 64, 3 << 20, 5 << 20)


@pytest.mark.parametrize(("free", "fits"), [((64 + 8) << 20, True), (((64 + 8) << 20) - 1, False)])
def test_a_state_an_update_and_64_mib_must_fit_the_disk(
    free: int, fits: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1 << 40, 0, free))  # type: ignore[attr-defined]
    if fits:
        require_disk(tmp_path, ABOUT)
        return
    with pytest.raises(
        FedtuneError,
        match=r"R404: the disk of .* has 72.0 MiB free, and a state and an update take 72.0 MiB; free space",
    ):
        require_disk(tmp_path, ABOUT)


def test_a_run_that_has_no_room_to_say_why_it_ended_is_not_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require_room(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1 << 40, 0, 8192))  # type: ignore[attr-defined]
    with pytest.raises(
        FedtuneError,
        match=r"R404: there is no space left for run '.*' \(8.0 KiB free, 1.0 MiB needed\); free space, then: "
        r"fedtune resume",
    ):
        require_room(tmp_path)


def test_weights_and_what_is_trained_must_fit_the_memory(
    tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tiny encoder: 20,800 parameters and a few trained ones, 4 bytes each and 16 for what is trained;
    activations are an estimate and do not count."""
    recipe = small.recipe(tiny_bert, small.write_rows(tmp_path))
    monkeypatch.setattr(hardware, "free_memory", lambda: 1 << 20)
    require_memory(recipe, 3, "cpu")
    monkeypatch.setattr(hardware, "free_memory", lambda: 80_000)
    with pytest.raises(
        ClientFailed, match=r"M310: cpu has 78.1 KiB of free memory, and 'fedpeft' needs at least "
    ):
        require_memory(recipe, 3, "cpu")

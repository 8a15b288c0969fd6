"""What a machine has left: a container's limit counts, and files that the kernel only caches do not."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedtune.model import hardware

OTHERS = "cache 7\ntotal_cache 7\n"


def lay(root: Path, **files: str) -> None:
    for name, text in files.items():
        (root / name.replace("__", ".")).write_text(text)


def test_a_containers_limit_counts_without_cached_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "GROUP", tmp_path)
    machine = hardware.free_memory()
    assert machine > 64 << 20
    lay(
        tmp_path,
        memory__max="67108864\n",
        memory__current="50331648\n",
        memory__stat=f"{OTHERS}inactive_file 8388608\n",
    )
    assert hardware.free_memory() == (64 - 48 + 8) << 20
    lay(tmp_path, memory__current="99999999\n")
    assert hardware.free_memory() == 0
    lay(tmp_path, memory__max="max\n")
    assert hardware.free_memory() > 64 << 20


def test_control_groups_of_the_first_kind_count_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "GROUP", tmp_path)
    (group := tmp_path / "memory").mkdir()
    lay(
        group,
        memory__limit_in_bytes="67108864\n",
        memory__usage_in_bytes="50331648\n",
        memory__stat=f"{OTHERS}total_inactive_file 8388608\n",
    )
    assert hardware.free_memory() == (64 - 48 + 8) << 20
    lay(group, memory__limit_in_bytes="9223372036854771712\n")
    assert hardware.free_memory() > 64 << 20


def test_a_device_has_a_speed_and_one_that_is_not_there_a_sentence() -> None:
    assert hardware.means("cpu")["device"] == "cpu" and hardware.speed("cpu") == hardware.speed("cpu") > 0.1
    with pytest.raises(Exception, match="M301"):
        hardware.speed("cuda:99")

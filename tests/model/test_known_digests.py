"""A large model's digest is computed once for the files that it was read from; what the files or the
tokenizer say otherwise is another digest."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from fedtune.model import base as bases
from fedtune.model import initial_values, known_digests
from fedtune.model.base import Base, load
from fedtune.model.initial_values import digest_of, keep_origin
from fedtune.model.settings import ModelSettings
from fedtune.model.tunable import attach
from tests.tables import adapter_of


@pytest.fixture
def counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """All models are large; which were hashed."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(known_digests, "WORTH", 1)
    monkeypatch.setattr(initial_values, "WORTH", 1)
    hashed: list[str] = []

    def digest(*groups: Any, **how: Any) -> Any:
        hashed.append("base")
        return plain(*groups, **how)

    def values(tensors: Any) -> bytes:
        hashed.extend(["values"] * (len(tensors) > 1))
        return digest_of(tensors)

    plain = bases.digest
    monkeypatch.setattr(bases, "digest", digest)
    monkeypatch.setattr(initial_values, "digest_of", values)
    return hashed


def copied(folder: Path, place: Path) -> Path:
    return Path(shutil.copytree(folder, place))


def read(place: Path, **how: Any) -> Base:
    return load(ModelSettings(name=str(place), threads=1, device="cpu", **how), "classify", ("a", "b"), 5)


def test_a_digest_is_computed_once_for_its_files(
    counted: list[str], tiny_bert: Path, tmp_path: Path, workspace: Any
) -> None:
    place = copied(tiny_bert, tmp_path / "model")
    first = read(place).fingerprint
    assert first == read(place).fingerprint == workspace.base("encoder").fingerprint
    assert counted[:1] == ["base"] and len(counted) <= 2  # the shared one may have been asked before


def test_other_files_or_another_tokenizer_are_another_digest(
    counted: list[str], tiny_bert: Path, tmp_path: Path
) -> None:
    place = copied(tiny_bert, tmp_path / "model")
    first = read(place).fingerprint
    (file,) = place.glob("*.safetensors")
    times = file.stat()
    net = transformers.AutoModel.from_pretrained(place)
    with torch.no_grad():
        net.encoder.layer[1].output.dense.weight[0, 0] += 1e-3
    net.save_pretrained(tmp_path / "other")
    file.write_bytes((tmp_path / "other" / file.name).read_bytes())  # of the same size, in the same inode
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))  # and of the same time, as a copy may have it
    changed = read(place).fingerprint
    longer = read(place)
    longer.tokenizer.add_tokens(["zebra"])
    assert len({first, changed, longer.fingerprint}) == 3 and counted == ["base"] * 3


def test_types_have_digests_of_their_own(counted: list[str], tiny_bert: Path, tmp_path: Path) -> None:
    place = copied(tiny_bert, tmp_path / "model")
    for _ in range(2):
        half = read(place, dtype="bfloat16")
        assert half.fingerprint == read(place).fingerprint != half.held_fingerprint
    assert counted == ["base"] * 3  # the checkpoint beside each type, and the rounded weights


def test_first_values_that_are_the_base_s_are_hashed_once(
    counted: list[str], tiny_bert: Path, tmp_path: Path
) -> None:
    place = copied(tiny_bert, tmp_path / "model")
    found = []
    for seed in (1, 1, 2):  # another head
        tunable = attach(read(place), adapter_of("full"), 1)
        keep_origin(tunable, seed)
        assert tunable.origin.digest == digest_of(tunable.origin.tensors)
        found.append(tunable.origin.digest)
    assert found[0] == found[1] != found[2]
    assert counted == ["base", "values", "values"]


def test_a_file_that_is_no_digest_is_made_anew(counted: list[str], tiny_bert: Path, tmp_path: Path) -> None:
    place = copied(tiny_bert, tmp_path / "model")
    first = read(place).fingerprint
    (kept,) = known_digests.folder().iterdir()
    assert kept.stat().st_mode & 0o777 == 0o600
    kept.write_text("0" * 63 + "x")
    assert read(place).fingerprint == first == kept.read_text()


def test_what_cannot_be_kept_is_computed(
    counted: list[str], tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    place = copied(tiny_bert, tmp_path / "model")
    assert read(place).fingerprint == read(place).fingerprint and counted == ["base"] * 2

"""Rows as tokens on disk: what they say is what encoding says, or they are made anew."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedtune.model import token_cache
from fedtune.model.encode import Encoded, encode
from fedtune.model.token_cache import LEAST, TokenCache, digest, key_of
from tests import small, tiny

HOW: dict[str, Any] = {
    "max_length": 12,
    "stride": 0,
    "separator": "eos",
    "overlong": "cut",
    "template": "plain",
    "system": "",
    "day": date(2025, 1, 1),
}


def rows_of(kind: str) -> list[dict[str, Any]]:
    texts = tiny.texts(LEAST)
    if kind == "instruct":
        return [{"prompt": f"question {n}", "response": str(row["text"])} for n, row in enumerate(texts)]
    if kind == "preference":
        return [
            {"prompt": f"question {n}", "chosen": str(row["text"]), "rejected": "no"}
            for n, row in enumerate(texts)
        ]
    if kind == "chat":
        return [
            {
                "messages": [
                    {"role": "user", "content": f"question {n}", "name": "somebody"},
                    {"role": "assistant", "content": str(row["text"])},
                ]
            }
            for n, row in enumerate(texts)
        ]
    return texts


def base_for(workspace: Any, kind: str) -> Any:
    if kind == "preference":
        return replaced(workspace.base("instruct"), task="preference")
    return workspace.base({"chat": "instruct"}.get(kind, kind))


def quiet() -> None:
    """Nobody asks whether it gets on."""


@pytest.fixture
def cache(tmp_path: Path) -> TokenCache:
    return TokenCache(tmp_path / "tokens", 1 << 20)


@pytest.fixture
def encodings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each call of `encode` was given."""
    seen: list[int] = []

    def counted(rows: Any, base: Any, **how: Any) -> Encoded:
        seen.append(len(rows))
        return encode(rows, base, **how)

    monkeypatch.setattr(token_cache, "encode", counted)
    return seen


def same(one: Encoded, other: Encoded) -> None:
    assert replace(one, examples=(), collate=sum) == replace(other, examples=(), collate=sum)
    for mine, theirs in zip(one.examples, other.examples, strict=True):
        assert mine.keys() == theirs.keys()
        for name, value in mine.items():
            assert value.dtype == theirs[name].dtype and np.array_equal(value, theirs[name])
    here, there = one.collate([0, 3, 1]), other.collate([0, 3, 1])
    assert all(torch.equal(value, there[name]) for name, value in here.items())


@pytest.mark.parametrize("kind", ["encoder", "causal", "instruct", "chat", "decoder", "preference"])
def test_what_is_kept_is_what_encoding_says(
    kind: str, workspace: Any, cache: TokenCache, encodings: list[int]
) -> None:
    base, rows = base_for(workspace, kind), rows_of(kind)
    how = HOW | {"max_length": {"chat": 48, "encoder": 9}.get(kind, 12)}
    want = encode(rows, base, **how)
    same(cache.encoded(rows, base, how, quiet), want)
    same(cache.encoded(rows, base, how, quiet), want)
    assert encodings == [LEAST]
    assert want.unshown == ({"name": LEAST} if kind == "chat" else {})
    assert len(want) == LEAST or (kind == "causal" and len(want) > LEAST)
    assert bool(want.truncated) == (kind in ("encoder", "instruct", "decoder", "preference"))


def test_images_and_few_rows_are_not_kept(workspace: Any, cache: TokenCache, encodings: list[int]) -> None:
    cache.encoded(tiny.images(LEAST), workspace.base("images"), HOW, quiet)
    cache.encoded(tiny.texts(LEAST - 1), workspace.base("encoder"), HOW, quiet)
    assert encodings == [LEAST, LEAST - 1] and not cache.folder.exists()


@pytest.mark.parametrize(
    "change",
    [
        {"max_length": 11},
        {"stride": 3},
        {"separator": "none"},
        {"overlong": "refuse"},
        {"template": "chat"},
        {"system": "be short"},
        {"day": date(2025, 1, 2)},
    ],
    ids=str,
)
def test_other_settings_are_another_name(change: dict[str, Any], workspace: Any) -> None:
    base, rows = workspace.base("instruct"), rows_of("instruct")
    assert key_of(rows, base, HOW) != key_of(rows, base, HOW | change)


def test_other_rows_tokenizers_tasks_and_code_are_another_name(
    workspace: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, rows = workspace.base("instruct"), rows_of("instruct")
    names = [key_of(rows, base, HOW), key_of(rows[::-1], base, HOW), key_of(rows[1:], base, HOW)]
    names.append(key_of([{**rows[0], "response": "no"}, *rows[1:]], base, HOW))
    names.append(key_of(rows, workspace.base("causal"), HOW))
    names.append(key_of(rows, replaced(base, labels=("a",)), HOW))
    other = workspace.load("instruct")
    other.tokenizer.eos_token = "<s>"
    names.append(key_of(rows, other, HOW))
    template = workspace.load("instruct")
    template.tokenizer.chat_template += " "
    names.append(key_of(rows, template, HOW))
    monkeypatch.setattr(token_cache, "code", lambda: "another version")
    names.append(key_of(rows, base, HOW))
    assert None not in names and len(set(names)) == len(names)
    assert key_of([{"text": {1, 2}}], base, HOW) is None


def replaced(base: Any, **changes: Any) -> Any:
    """A base that shares everything else."""
    other = object.__new__(type(base))
    vars(other).update(vars(base) | changes)
    return other


def flipped(place: int) -> Callable[[bytes], bytes]:
    return lambda content: content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


@pytest.mark.parametrize(
    "damage",
    [
        flipped(0),
        flipped(40),
        flipped(200),
        flipped(-5),
        lambda c: c[:-1],
        lambda c: c + b"\0",
        lambda c: b"",
    ],
    ids=["digest", "header", "middle", "end", "short", "long", "empty"],
)
def test_damaged_files_are_made_anew(
    damage: Callable[[bytes], bytes], workspace: Any, cache: TokenCache, encodings: list[int]
) -> None:
    base, rows = workspace.base("instruct"), rows_of("instruct")
    want = cache.encoded(rows, base, HOW, quiet)
    (path,) = cache.folder.iterdir()
    good = path.read_bytes()
    path.write_bytes(damage(good))
    same(cache.encoded(rows, base, HOW, quiet), want)
    assert encodings == [LEAST, LEAST] and path.read_bytes() == good


def test_a_file_of_other_rows_is_not_believed(
    workspace: Any, cache: TokenCache, encodings: list[int]
) -> None:
    """Under this name; nor is one whose digest is right and whose content is no set of texts."""
    base, rows = workspace.base("instruct"), rows_of("instruct")
    want, other = encode(rows, base, **HOW), rows_of("instruct")[::-1]
    cache.encoded(other, base, HOW, quiet)
    (path,) = cache.folder.iterdir()
    key = key_of(rows, base, HOW)
    assert key
    mine = path.rename(cache.folder / f"{key}.tokens")
    same(cache.encoded(rows, base, HOW, quiet), want)
    shorter = token_cache.content_of(encode(rows, base, **HOW | {"max_length": 30}))
    for content in (b"{}", shorter, token_cache.content_of(workspace.encoded("encoder"))):
        mine.write_bytes(digest(key, content) + content)
        same(cache.encoded(rows, base, HOW, quiet), want)
    assert len(encodings) == 5


def test_nobody_else_may_read_it(workspace: Any, cache: TokenCache) -> None:
    cache.encoded(rows_of("encoder"), workspace.base("encoder"), HOW, quiet)
    (path,) = cache.folder.iterdir()
    assert [stat.S_IMODE(one.stat().st_mode) for one in (cache.folder, path)] == [0o700, 0o600]


def test_the_files_that_were_not_read_for_longest_go(workspace: Any, tmp_path: Path) -> None:
    base, wide = workspace.base("encoder"), TokenCache(tmp_path, 1 << 20)
    sets = [[{**row, "number": number} for row in rows_of("encoder")] for number in range(4)]
    for number, rows in enumerate(sets[:3]):
        wide.encoded(rows, base, HOW, quiet)
        os.utime(path_of(wide, rows, base), (number, number))
    wide.encoded(sets[0], base, HOW, quiet)  # which is now the one read last
    size = path_of(wide, sets[0], base).stat().st_size
    TokenCache(tmp_path, 2 * size + size // 2).encoded(sets[3], base, HOW, quiet)
    assert [path_of(wide, rows, base).exists() for rows in sets] == [True, False, False, True]
    TokenCache(tmp_path, size - 1).encoded(sets[1], base, HOW, quiet)
    assert not path_of(wide, sets[1], base).exists()  # larger than all that there may be
    for age, part in ((0, tmp_path / ".new.part"), (7200, tmp_path / ".old.part")):
        part.write_bytes(b"half")
        os.utime(part, (time.time() - age,) * 2)
    TokenCache(tmp_path, 0).encoded(sets[1], base, HOW, quiet)
    assert [path.name for path in tmp_path.iterdir()] == [".new.part"]
    (tmp_path / ".new.part").unlink()
    assert not list(tmp_path.iterdir())  # switched off: nothing is left


def path_of(cache: TokenCache, rows: Any, base: Any) -> Path:
    return cache.folder / f"{key_of(rows, base, HOW)}.tokens"


def test_a_disk_that_takes_nothing_is_no_error(workspace: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    rows, base = rows_of("encoder"), workspace.base("encoder")
    same(TokenCache(tmp_path / "file", 1 << 20).encoded(rows, base, HOW, quiet), encode(rows, base, **HOW))


def test_a_run_ends_with_the_same_bytes(
    tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encodings: list[int]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    data = small.write_rows(tmp_path, 300)
    kept = small.recipe(tiny_bert, data, rounds=1, partition={"by": "iid", "clients": 2})
    off = small.recipe(tiny_bert, data, rounds=1, partition={"by": "iid", "clients": 2}, data__cache=False)
    assert kept.fingerprint == off.fingerprint
    ends = []
    for number, recipe in enumerate((off, kept, kept)):
        _, result, _ = small.play(recipe, tmp_path / str(number))
        ends.append(result["state_sha256"])
    assert len(set(ends)) == 1 and [count for count in encodings if count >= LEAST] == [108, 108]
    assert len(list((tmp_path / "cache" / "fedtune" / "tokens").iterdir())) == 2

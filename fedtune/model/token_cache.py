"""Rows as tokens, kept on disk between starts: a file for each set of rows, named by all that its tokens
follow from (rows, tokenizer, settings of [data], and the code that makes them).

The files say in tokens what the rows say in words, so they lie where only their owner may read them, on the
machine that holds the rows. A file whose digest, name or shape is not as it should be is made anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load, save

from fedtune.model import chat, template
from fedtune.model import encode as encoding
from fedtune.model.base import Base
from fedtune.model.collate import Example, collation
from fedtune.model.encode import Alive, Encoded, Row, encode
from fedtune.model.fingerprint import tokenizer_text
from fedtune.types import LM_TASKS

LEAST = 64  # rows: fewer are tokenised as fast as they are found
SUFFIX = ".tokens"
HOUR = 3600.0
KNOWN, LENGTHS = "known", "lengths of "
DIGEST = hashlib.sha256().digest_size


@dataclass(frozen=True)
class TokenCache:
    """A folder of at most `most` bytes; the files that were not read for longest go first. What cannot be
    kept is no error: rows are tokenised again."""

    folder: Path
    most: int

    @classmethod
    def of_user(cls) -> TokenCache:
        """$XDG_CACHE_HOME/fedtune/tokens (~/.cache/fedtune/tokens), at most 2 GiB."""
        place = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
        return cls(place / "fedtune" / "tokens", 2 << 30)

    def encoded(self, rows: Sequence[Row], base: Base, how: Mapping[str, Any], alive: Alive) -> Encoded:
        """What `encode` makes of rows. Raises what it raises."""
        key = None
        if not self.most:
            with contextlib.suppress(OSError):
                self.trim(0)
        elif len(rows) >= LEAST and base.task != "image-classify":
            key = key_of(rows, base, how)
        if key and (found := self.read(key, base, how["max_length"])):
            return found
        made = encode(rows, base, **how, alive=alive)
        if key:
            self.keep(key, content_of(made))
        return made

    def read(self, key: str, base: Base, max_length: int) -> Encoded | None:
        path = self.folder / (key + SUFFIX)
        try:
            content = path.read_bytes()
        except OSError:
            return None
        with contextlib.suppress(Exception):  # whatever is in a file that is not ours
            if content[:DIGEST] == digest(key, content[DIGEST:]):
                found = encoded_of(content[DIGEST:], base, max_length)
                os.utime(path)
                return found
        with contextlib.suppress(OSError):
            path.unlink()
        return None

    def keep(self, key: str, content: bytes) -> None:
        size = DIGEST + len(content)
        if size > self.most:
            return
        with contextlib.suppress(OSError):
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.trim(self.most - size)
            handle, part = tempfile.mkstemp(".part", ".", self.folder)  # of mode 0600
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(digest(key, content) + content)
                os.replace(part, self.folder / (key + SUFFIX))
            except OSError:
                os.unlink(part)
                raise

    def trim(self, most: int) -> None:
        """Down to so many bytes; what an interrupted process left half-written goes, too."""
        for part in self.folder.glob(".*.part"):
            if part.stat().st_mtime < time.time() - HOUR:
                part.unlink(missing_ok=True)
        files = [(path.stat(), path) for path in self.folder.glob("*" + SUFFIX)]
        total = sum(about.st_size for about, _ in files)
        for about, path in sorted(files, key=lambda one: one[0].st_mtime_ns):
            if total <= most:
                return
            path.unlink(missing_ok=True)
            total -= about.st_size


def digest(key: str, content: bytes) -> bytes:
    return hashlib.sha256(key.encode() + content).digest()


def key_of(rows: Sequence[Row], base: Base, how: Mapping[str, Any]) -> str | None:
    """SHA-256 over all that the tokens follow from, as hex; None for rows that JSON cannot say."""
    total = hashlib.sha256(code().encode())
    total.update(tokenizer_digest(base).encode())
    total.update(json.dumps([base.task, base.labels, how], sort_keys=True, default=str).encode())
    try:
        for row in rows:
            total.update(json.dumps(row, sort_keys=True).encode() + b"\n")
    except (TypeError, ValueError):
        return None
    return total.hexdigest()


@cache
def code() -> str:
    """Digest of what makes tokens of rows: these modules, and the libraries' versions."""
    total = hashlib.sha256(" ".join(map(version, ("transformers", "tokenizers", "jinja2"))).encode())
    for module in (chat, template, encoding):
        total.update(Path(str(module.__file__)).read_bytes())
    return total.hexdigest()


def tokenizer_digest(base: Base) -> str:
    """Of the tokenizer with its special tokens and chat template; computed once for each base."""
    if base.tokenizer_digest is None:
        known = base.tokenizer
        said = json.dumps(
            [type(known).__name__, known.special_tokens_map, known.all_special_ids, known.truncation_side],
            sort_keys=True,
            default=str,
        )
        base.tokenizer_digest = hashlib.sha256((tokenizer_text(known) + said).encode()).hexdigest()
    return base.tokenizer_digest


def content_of(made: Encoded) -> bytes:
    """safetensors: of each array that examples have, all examples' one behind another, and how long each is;
    and what else is known of them, as JSON."""
    known = json.dumps([made.tokens, made.truncated, made.dropped, dict(made.unshown)])
    tensors = {KNOWN: np.frombuffer(known.encode(), np.uint8)}
    for name in made.examples[0] if made.examples else ():
        parts = [np.ravel(example[name]) for example in made.examples]
        tensors[name] = np.concatenate(parts).astype(np.int32)
        tensors[LENGTHS + name] = np.asarray([len(part) for part in parts], np.int32)
    return bytes(save(tensors))


def encoded_of(content: bytes, base: Base, max_length: int) -> Encoded:
    """The inverse. Raises whatever there is to raise where the content is not such a thing."""
    tensors = load(content)
    tokens, truncated, dropped, unshown = json.loads(tensors.pop(KNOWN).tobytes())
    language, arrays = base.task in LM_TASKS, {"input_ids", "labels"}
    if base.task == "preference":
        arrays |= {f"rejected_{name}" for name in arrays}
    if tensors.keys() not in (set(), arrays | {LENGTHS + name for name in arrays}):
        raise ValueError("arrays of another task")
    columns = {}
    for name in sorted(arrays & tensors.keys()):
        lengths = tensors[LENGTHS + name]
        ids = tensors[LENGTHS + (name.replace("labels", "input_ids") if language else name)]
        if lengths.min() < 1 or lengths.max() > max_length or not np.array_equal(lengths, ids):
            raise ValueError("lengths of other texts")
        ends = np.cumsum(lengths)
        if ends[-1] != len(tensors[name]):
            raise ValueError("lengths of other texts")
        columns[name] = np.split(tensors[name], ends[:-1])
    if columns and not language:
        columns["labels"] = [np.asarray(int(value[0])) for value in columns["labels"]]
    examples: list[Example] = [
        dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)
    ]
    return Encoded(
        examples, collation(examples, base), tokens, truncated, dropped, unshown, max_length=max_length
    )

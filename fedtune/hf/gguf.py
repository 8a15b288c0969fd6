"""GGUF files as ordinary model folders: transformers reads them, but neither keeps nor maps what it has read.

A file is dequantised once, to float32, which holds its values exactly, into a cache by the file's SHA-256;
whoever loads it later maps that. The cache is $XDG_CACHE_HOME/fedtune/gguf (~/.cache/fedtune/gguf).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import io
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from fedtune.errors import FedtuneError
from fedtune.extras import missing

SUFFIX = ".gguf"
MAGIC = b"GGUF"
FORM = "1"  # of the folders; another one is another cache
# what transformers says about the file that it came from, and not about the network
FOREIGN = {
    "quantization_config",
    "architectures",
    "model_type",
    "transformers_version",
    "dtype",
    "torch_dtype",
}


def is_gguf(name: str) -> bool:
    return name.lower().endswith(SUFFIX)


def unpacked(file: Path) -> Path:
    """The folder of a GGUF file's model: config.json, tokenizer files, *.safetensors in float32.

    Raises M301 (no such file, not GGUF, an architecture that transformers does not read, no package gguf).
    """
    try:
        with file.open("rb") as handle:
            magic = handle.read(len(MAGIC))
    except OSError as error:
        raise unreadable(file, f"cannot be read ({type(error).__name__})") from None
    if magic != MAGIC:
        raise unreadable(file, "does not begin like a GGUF file")
    about = file.stat()
    place = cache() / f"{digest_of(file, about.st_size, about.st_mtime_ns)}-{FORM}"
    return place if place.exists() else dequantise(file, place)


@functools.lru_cache(64)  # a run asks for its model's folder several times
def digest_of(file: Path, size: int, changed: int) -> str:
    """SHA-256 of a file, as long as it has this size and was last changed then."""
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fedtune" / "gguf"


def dequantise(file: Path, place: Path) -> Path:
    """Write the folder. Two processes that do it at once both do it; the second finds the first one's."""
    if importlib.util.find_spec("gguf") is None:
        raise missing("gguf", "gguf", f"'{file}'", "M301")
    place.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(dir=place.parent, prefix=".part-"))
    try:
        with contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO()):
            write(file, made)  # whose bars are for people
        try:
            made.rename(place)
        except OSError:  # another process was faster
            if not place.exists():
                raise
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return place


def write(file: Path, folder: Path) -> None:
    """Config, tokenizer and float32 weights. A copy of the network with a plain config, because transformers
    will not save a model that it thinks is quantised."""
    import torch
    import transformers

    known: dict[str, Any] = {"gguf_file": file.name, "local_files_only": True, "trust_remote_code": False}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, **known)
        net = transformers.AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **known)
    except (ValueError, KeyError, OSError, NotImplementedError) as error:
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise unreadable(file, first[:200]) from error
    config = type(net.config)(**{k: v for k, v in net.config.to_dict().items() if k not in FOREIGN})
    with torch.device("meta"):
        plain = type(net)(config)
    plain.load_state_dict(net.state_dict(), strict=False, assign=True)
    plain.tie_weights()
    if any(value.is_meta for value in plain.state_dict().values()):
        raise unreadable(file, "lacks weights")
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def unreadable(file: Path, why: str) -> FedtuneError:
    return FedtuneError(
        "M301",
        f"no usable model at '{file}' ({why})",
        "a GGUF file of an architecture that transformers reads",
        "check model.name, or convert the model to a folder with config.json and *.safetensors",
    )

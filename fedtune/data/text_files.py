"""Reading text files as people have them: compressed or not, with a byte order mark, in an encoding with a
name."""

from __future__ import annotations

import codecs
import gzip
from pathlib import Path

from fedtune.errors import FedtuneError

MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}


def read_bytes(path: Path) -> bytes:
    """A file's content, unpacked where it is .gz. Raises D201 and D203."""
    try:
        return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except IsADirectoryError as error:
        raise FedtuneError("D201", f"the folder '{path}'", "a file", "correct data.path") from error
    except (gzip.BadGzipFile, EOFError) as error:
        raise FedtuneError(
            "D203",
            f"'{path}', which is not a complete gzip file ({error})",
            "a complete file",
            "copy or download it again",
        ) from error


def read_text(path: Path, encoding: str = "utf-8") -> str:
    """A text file, line ends as \\n; a byte order mark decides about the encoding. Raises D203 with the
    encoding that would fit."""
    raw = read_bytes(path)
    known = next((name for mark, name in MARKS.items() if raw.startswith(mark)), encoding)
    try:
        text = raw.decode(known)
    except UnicodeDecodeError as error:
        likely = "cp1252" if known != "cp1252" and fits(raw, "cp1252") else "latin-1"
        line = 1 + raw[: error.start].count(b"\n")
        found = f"'{path}', which is not {known.upper()} at byte {error.start}, in line {line}"
        raise FedtuneError(
            "D203",
            found,
            f"a text file in {known.upper()}",
            f"convert it, or set data.encoding (perhaps '{likely}')",
        ) from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def fits(raw: bytes, encoding: str) -> bool:
    try:
        raw.decode(encoding)
    except UnicodeDecodeError:
        return False
    return True

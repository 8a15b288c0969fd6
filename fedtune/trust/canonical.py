"""One encoding for what is signed: two different records never share bytes, and bytes of one kind are never
bytes of another.

A domain tag that ends in a zero byte, then every field as its length (8 bytes, big-endian) and its bytes.
Fields come in a fixed
order, their number is fixed by the tag, integers are 8 bytes: so the encoding can be read back in one way
only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from fedtune.errors import Refused

Form = Literal["text", "number", "bytes"]
Value = str | int | bytes
LONGEST = (
    1 << 20
)  # bytes of one field: names, hashes and settings (a recipe with a few thousand labels), never payloads


def join(tag: bytes, fields: Sequence[tuple[Form, Value]]) -> bytes:
    """Raises ValueError for a value that has no encoding."""
    if b"\0" in tag:
        raise ValueError("a tag ends at its first zero byte")
    parts = [tag, b"\0"]
    for form, value in fields:
        content = to_bytes(form, value)
        if len(content) > LONGEST:
            raise ValueError(f"a field of {len(content)} bytes, at most {LONGEST} can be signed")
        parts += [len(content).to_bytes(8), content]
    return b"".join(parts)


def part(tag: bytes, data: bytes, forms: Mapping[str, Form]) -> dict[str, Value]:
    """The fields of `join` by name. Raises Refused W601 for anything that `join` does not make."""
    if not data.startswith(tag + b"\0"):
        raise damaged(f"bytes that do not begin as {tag.decode()}")
    at, values = len(tag) + 1, {}
    for name, form in forms.items():
        size = int.from_bytes(data[at : at + 8])
        content = data[at + 8 : at + 8 + size] if size <= LONGEST else b""
        if len(data) < at + 8 or len(content) != size:
            raise damaged(f"a field '{name}' that is cut or too long")
        values[name] = from_bytes(form, content, name)
        at += 8 + size
    if at != len(data):
        raise damaged("bytes after the last field")
    return values


def to_bytes(form: Form, value: Value) -> bytes:
    if form == "number" and isinstance(value, int):
        return value.to_bytes(8) if 0 <= value < 1 << 64 else bytes(LONGEST + 1)
    if form == "text" and isinstance(value, str):
        return value.encode()
    if form == "bytes" and isinstance(value, bytes):
        return value
    raise ValueError(f"{type(value).__name__} where a {form} belongs")


def from_bytes(form: Form, content: bytes, name: str) -> Value:
    if form == "bytes":
        return content
    if form == "number":
        if len(content) != 8:
            raise damaged(f"a number '{name}' of {len(content)} bytes")
        return int.from_bytes(content)
    try:
        return content.decode()
    except UnicodeDecodeError:
        raise damaged(f"a text '{name}' that is not UTF-8") from None


def damaged(found: str) -> Refused:
    return Refused(
        "W601", found, "a whole signed record", "the message was dropped; the sender should send it again"
    )

"""The wire format: updates and states as canonical bytes, and what a receiver refuses."""

from fedtune.wire.changes import is_whole
from fedtune.wire.guard import Expect
from fedtune.wire.message import (
    EVERYONE,
    Header,
    decode,
    decode_state,
    encode,
    encode_changes,
    encode_state,
    schema_named,
)

__all__ = [
    "EVERYONE",
    "Expect",
    "Header",
    "decode",
    "decode_state",
    "encode",
    "encode_changes",
    "encode_state",
    "is_whole",
    "schema_named",
]

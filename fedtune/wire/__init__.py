"""The wire format: updates and states as canonical bytes, and what a receiver refuses."""

from fedtune.wire.changes import is_whole
from fedtune.wire.guard import Expect, Seen
from fedtune.wire.message import EVERYONE, Header, as_sent, decode, decode_state, encode, encode_changes, encode_state

__all__ = ["EVERYONE", "Expect", "Header", "Seen", "as_sent", "decode", "decode_state", "encode", "encode_changes", "encode_state", "is_whole"]

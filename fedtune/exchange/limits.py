"""What one exchange takes at once."""

from __future__ import annotations

from dataclasses import dataclass

CHUNK = 1 << 20  # bytes of a piece, inflated
FRAME = CHUNK + 4096  # longest gRPC message: a piece and its frame
ENVELOPE = 4096  # longest envelope


@dataclass(frozen=True)
class Limits:
    """Bounds of memory, threads and disk.

    uploads, downloads   streams at once
    waiting              streams of each kind that may wait for one of those to end (a thread each, no bytes); more are told when to come again
    wait_seconds         how long they wait before they are told so too
    stall_seconds        a stream that moves nothing for so long is cut (its bytes are kept)
    free_bytes           of the disk that stay free
    """

    uploads: int = 16
    downloads: int = 16
    waiting: int = 256
    wait_seconds: float = 30.0
    stall_seconds: float = 30.0
    free_bytes: int = 64 << 20

    @property
    def threads(self) -> int:
        """One a stream, waiting or not, and eight for whoever only asks."""
        return self.uploads + self.downloads + 2 * self.waiting + 8

    @property
    def memory(self) -> int:
        """Bytes that streams hold at most: gRPC's window, its read buffer and the message, the parsed piece and the inflated one."""
        return (self.uploads + self.downloads) * 5 * FRAME

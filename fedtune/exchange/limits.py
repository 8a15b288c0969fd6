"""What one exchange takes at once."""

from __future__ import annotations

from dataclasses import dataclass

CHUNK = (
    256 << 10
)  # bytes of a piece, inflated; 1 MiB was no faster, and gRPC keeps several of them for each connection
FRAME = CHUNK + 4096  # longest gRPC message: a piece and its frame
WINDOW = 2 << 20  # bytes on their way in one stream: 20 MB a second at a round trip of 100 ms
CONNECTION = 512 << 10  # bytes that gRPC keeps for a connection that was busy
ENVELOPE = 4096  # longest envelope


@dataclass(frozen=True)
class Limits:
    """Bounds of memory, threads and disk.

    uploads, downloads   streams at once
    waiting              streams of each kind that may wait for one of those to end (a thread each, no bytes);
                         more are told when to come again
    wait_seconds         how long they wait before they are told so too
    calls, fetches       of one member at once: whatever they do; states that it is given
    connections          of one address at once
    stall_seconds        a stream that moves nothing for so long is cut (its bytes are kept)
    free_bytes           of the disk that stay free
    """

    uploads: int = 16
    downloads: int = 16
    waiting: int = 256
    wait_seconds: float = 30.0
    calls: int = 16
    fetches: int = 2
    connections: int = 256
    stall_seconds: float = 30.0
    free_bytes: int = 64 << 20

    @property
    def threads(self) -> int:
        """One a stream, waiting or not, and eight for whoever only asks."""
        return self.uploads + self.downloads + 2 * self.waiting + 8

    def memory(self, connections: int) -> int:
        """Bytes that streams and connections add at most: a stream its window twice (as it came, decrypted)
        and a few pieces, a connection its buffers."""
        return (self.uploads + self.downloads) * (2 * WINDOW + 4 * FRAME) + connections * CONNECTION

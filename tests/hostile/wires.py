"""A SuperLink that keeps every byte it is sent, and reads requests as HTTP/1.1 says: what it sees is what
Flower's server would see."""

from __future__ import annotations

import contextlib
import socket
import threading


class Recorder:
    """Answers every request that it finds in a stream with 200; `streams` holds each connection's bytes,
    `requests` the request lines in all of them."""

    def __init__(self, answer: bytes = b"") -> None:
        self.answer, self.streams = answer, list[bytearray]()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                call, _ = self.listener.accept()
                stream = bytearray()
                self.streams.append(stream)
                threading.Thread(target=self._serve, args=(call, stream), daemon=True).start()

    def _serve(self, call: socket.socket, stream: bytearray) -> None:
        told = 0
        with call, contextlib.suppress(OSError):
            call.settimeout(2.0)
            while data := call.recv(65536):
                stream += data
                found, whole = requests_in(bytes(stream))
                for _ in found[told:]:
                    call.sendall(
                        b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (len(self.answer), self.answer)
                    )
                told = len(found)
                assert whole or told == 0, "bytes after a whole request"

    @property
    def requests(self) -> list[str]:
        return [line for stream in self.streams for line in requests_in(bytes(stream))[0]]

    def close(self) -> None:
        self.listener.close()


def requests_in(stream: bytes) -> tuple[list[str], bool]:
    """Request lines of the whole requests in a stream, and whether nothing is left over. A line with a length
    or a coding that is not plain counts, too."""
    found: list[str] = []
    while b"\r\n\r\n" in stream:
        head, _, rest = stream.partition(b"\r\n\r\n")
        line, *headers = head.split(b"\r\n")
        names = [header.partition(b":")[0].strip().lower() for header in headers]
        lengths = [
            int(header.partition(b":")[2])
            for header in headers
            if header.lower().startswith(b"content-length:")
        ]
        if (
            len(lengths) != 1
            or b"transfer-encoding" in names
            or len(names) != len(set(names))
            or any(name != name.strip() for name in names)
        ):
            found.append("AMBIGUOUS " + line.decode("latin-1"))
            return found, False
        if len(rest) < lengths[0]:
            return found, False
        found.append(line.decode("latin-1"))
        stream = rest[lengths[0] :]
    return found, not stream

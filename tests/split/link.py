"""A TCP proxy in a thread: counts bytes, delays them, limits their rate, cuts them."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time

from tests.waiting import PATIENCE


class Link:
    """Between a client and `port` on this machine; `self.port` is where to connect. Seconds one way, bytes
    per second each way."""

    def __init__(self, port: int, delay: float = 0.0, rate: float = 0.0) -> None:
        self.target, self.delay, self.rate = port, delay, rate
        self.up = self.down = 0
        self.writers: set[asyncio.StreamWriter] = set()
        self.loop = asyncio.new_event_loop()
        ready = threading.Event()
        self.thread = threading.Thread(target=self.run, args=(ready,), daemon=True)
        self.thread.start()
        ready.wait()

    def run(self, ready: threading.Event) -> None:
        asyncio.set_event_loop(self.loop)
        self.server = self.loop.run_until_complete(asyncio.start_server(self.join, "127.0.0.1", 0))
        self.port = self.server.sockets[0].getsockname()[1]
        ready.set()
        self.loop.run_forever()
        self.loop.close()

    async def join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there, back = await asyncio.open_connection("127.0.0.1", self.target)
        except OSError:
            writer.transport.abort()
            return
        self.writers |= {writer, back}
        await asyncio.gather(self.pump(reader, back, True), self.pump(there, writer, False))

    async def pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, up: bool) -> None:
        """Bytes leave in order: after those before them at this rate, plus the delay."""
        waiting: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(64)
        sender, free = asyncio.ensure_future(self.late(waiting, writer)), 0.0
        with contextlib.suppress(OSError):
            while data := await reader.read(16384):
                if up:
                    self.up += len(data)
                else:
                    self.down += len(data)
                free = max(time.monotonic(), free) + (len(data) / self.rate if self.rate else 0.0)
                await waiting.put((free + self.delay, data))
        await waiting.put((0.0, b""))
        await sender

    async def late(self, waiting: asyncio.Queue[tuple[float, bytes]], writer: asyncio.StreamWriter) -> None:
        """Writes what is due; what comes after a broken connection is thrown away."""
        while (item := await waiting.get())[1]:
            if (wait := item[0] - time.monotonic()) > 0:
                await asyncio.sleep(wait)
            with contextlib.suppress(OSError):
                writer.write(item[1])
                await writer.drain()
        writer.close()

    def cut(self) -> None:
        """Break every connection, without a farewell."""
        self.loop.call_soon_threadsafe(lambda: [writer.transport.abort() for writer in self.writers])

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self.over(), self.loop).result(PATIENCE)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()

    async def over(self) -> None:
        self.server.close()
        for writer in self.writers:
            writer.transport.abort()
        await asyncio.gather(*(asyncio.all_tasks() - {asyncio.current_task()}), return_exceptions=True)

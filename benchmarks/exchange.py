"""The exchange under load: many clients upload at once, and many more only stay connected.

Claims: every update is accepted; the server's memory stays under a bound that does not grow with clients or
sizes; uploads that are
signed, hashed, journaled and made safe on disk move at least half the bytes a second of a plain gRPC stream
under the same TLS with
the same clients, whether that one throws its bytes away or writes and fsyncs them too. Idle connections cost
what they cost.

    python benchmarks/exchange.py [--full | --tiny]      20 clients x 4 MB and 200 idle; --full: 200 x 16 MB
    and 1,000 idle
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import secrets
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import psutil
from claims import at_most, claim

from fedtune.exchange import ExchangeClient, Limits, ServerStore, serve
from fedtune.exchange.limits import CHUNK
from fedtune.exchange.tls import Door, secure_channel
from fedtune.trust import Identity, Ticket, load
from fedtune.trust.authority import create, open_authority

BASE = "b" * 64
STATE = b"state"
IDLE = 128  # KiB of the server's memory that a connection may cost that was never busy
PROCESSES = 2  # that the clients share: one of Python's would be busier than the server


def plain(folder: Path) -> Callable[[Door], grpc.GenericRpcHandler]:
    """The peers: client-streaming calls behind the same TLS, one throws its bytes away, one writes and fsyncs
    them."""

    def drop(requests: Iterator[bytes], context: Any) -> bytes:
        return str(sum(len(data) for data in requests)).encode()

    def keep(requests: Iterator[bytes], context: Any) -> bytes:
        total = 0
        with (folder / secrets.token_hex(8)).open("wb", buffering=0) as file:
            for data in requests:
                total += file.write(data)
            os.fsync(file.fileno())
        return str(total).encode()

    calls = {
        "Drop": grpc.stream_unary_rpc_method_handler(drop),
        "Keep": grpc.stream_unary_rpc_method_handler(keep),
    }
    return lambda door: grpc.method_handlers_generic_handler("Plain", calls)


def server(folder: Path) -> None:
    """A process of its own, whose memory is measured from outside. Its memory's limits are the defaults."""
    running = serve(
        ServerStore(folder / "exchange"),
        load(folder / "keys" / "coordinator"),
        "localhost:0",
        Limits(connections=1 << 16),  # all clients are on this machine
        also=(plain(folder),),
    )
    print(running.address, flush=True)
    sys.stdin.read()
    running.stop(1)


def clients(folder: Path, address: str, kind: str, first: int, count: int, size: int) -> None:
    """Some of the clients, a thread each; starts at a line on stdin, prints when all are done."""
    data = [
        os.urandom(size) for _ in range(min(count, 4))
    ]  # not count: this process should not be what runs out of memory
    if kind == "exchange":
        ready = {
            n: spooled(folder, address, n, n.to_bytes(4, "big") + data[n % len(data)][4:])
            for n in range(first, first + count)
        }
    else:
        members = {n: identity(folder, n) for n in range(first, first + count)}

    def work(n: int) -> None:
        if kind == "exchange":
            ready[n].flush()
        else:
            stream(members[n], address, kind, data[n % len(data)])

    threads = [threading.Thread(target=work, args=(n,)) for n in range(first, first + count)]
    print("ready", flush=True)
    sys.stdin.readline()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print("done", flush=True)


def identity(folder: Path, n: int) -> Identity:
    return load(folder / "keys" / "clients" / f"site-{n}")


def spooled(folder: Path, address: str, n: int, data: bytes) -> ExchangeClient:
    """A client with a finished update on its disk, signed: its own machine's work, done before the clock
    starts."""
    client = ExchangeClient(address, identity(folder, n), folder / "sites" / f"site-{n}")
    ticket = Ticket(
        "run",
        1,
        f"site-{n}",
        "train",
        address,
        BASE,
        hashlib.sha256(STATE).hexdigest(),
        len(STATE),
        len(data),
    )
    client.outbox.keep(ticket, data)
    return client


def stream(member: Identity, address: str, call: str, data: bytes) -> None:
    """The same bytes through one plain call."""
    with secure_channel(member, address) as channel:
        pieces = (data[at : at + CHUNK] for at in range(0, len(data), CHUNK))
        if channel.stream_unary(f"/Plain/{call}")(pieces, wait_for_ready=True) != str(len(data)).encode():
            raise SystemExit("bytes were lost")


def at_once(folder: Path, address: str, kind: str, count: int, size: int) -> float:
    """Seconds until all clients are done."""
    share = count // PROCESSES
    command = [
        sys.executable,
        __file__,
        "--folder",
        str(folder),
        "--address",
        address,
        "--kind",
        kind,
        "--size",
        str(size),
    ]
    running = [
        subprocess.Popen(
            [*command, "--first", str(n * share), "--count", str(share)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for n in range(PROCESSES)
    ]
    for process in running:
        assert process.stdout and process.stdout.readline() == "ready\n"
    begin = time.monotonic()
    for process in running:
        assert process.stdin
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in running:
        assert process.stdout
        if process.stdout.readline() != "done\n":
            raise SystemExit("a client failed")
    seconds = time.monotonic() - begin
    for process in running:
        process.communicate()
    return seconds


class Peak:
    """The most memory that a process was seen with."""

    def __init__(self, pid: int) -> None:
        self.process, self.bytes, self.on = psutil.Process(pid), 0, True
        self.thread = threading.Thread(target=self._look, daemon=True)
        self.thread.start()

    def _look(self) -> None:
        while self.on:
            self.bytes = max(self.bytes, self.process.memory_info().rss)
            time.sleep(0.02)

    def stop(self) -> int:
        self.on = False
        self.thread.join()
        return self.bytes


def idle(folder: Path, address: str, count: int, names: int) -> float:
    """`count` connections, each having asked for the status; then seconds of one status more while all
    stay."""
    channels = [secure_channel(identity(folder, n % names), address, alone=True) for n in range(count)]
    with ThreadPoolExecutor(16) as pool:
        list(
            pool.map(
                lambda c: c.unary_unary("/fedtune.wire.v1.Exchange/Status")(
                    b"", timeout=60, wait_for_ready=True
                ),
                channels,
            )
        )
    begin = time.monotonic()
    channels[0].unary_unary("/fedtune.wire.v1.Exchange/Status")(b"", timeout=60)
    return time.monotonic() - begin


def measure(folder: Path, count: int, size: int, connected: int) -> list[dict[str, Any]]:
    create(folder / "keys", "benchmark", ["localhost"], 1)
    authority = open_authority(folder / "keys")
    for n in range(count):
        authority.issue(f"site-{n}", 1)
    server_store = ServerStore(folder / "exchange")
    given = server_store.offer("run", STATE)
    server_store.open_round("run", 1, "train", BASE, {f"site-{n}": given for n in range(count)}, size)
    process = subprocess.Popen(
        [sys.executable, __file__, "--server", str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    address = process.stdout.readline().strip()
    start = psutil.Process(process.pid).memory_info().rss
    answer = idle(folder, address, connected, count)
    before, start = start, psutil.Process(process.pid).memory_info().rss
    each = (start - before) / connected / 1024

    peak = Peak(process.pid)
    seconds = at_once(folder, address, "exchange", count, size)
    most = peak.stop()
    accepted = server_store.accepted("run", 1, "train")
    good = sum(
        server_store.read("run", 1, "train", update.client)[:4] == int(update.client[5:]).to_bytes(4, "big")
        for update in accepted
    )
    drop, keep = (at_once(folder, address, kind, count, size) for kind in ("Drop", "Keep"))
    process.communicate()

    total, mib, bound = count * size / 1e6, 1 << 20, Limits().memory(count) / (1 << 20)
    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores at load "
        f"{os.getloadavg()[0]:.1f}, grpc {grpc.__version__}\n"
    )
    print(f"{count} clients at once, {size / 1e6:.0f} MB each, {Limits().uploads} slots")
    print(
        f"  exchange                    {total / seconds:8.1f} MB/s  {seconds:6.1f} s  accepted "
        f"{len(accepted)}, read back {good}"
    )
    print(f"  plain stream, dropped       {total / drop:8.1f} MB/s  {drop:6.1f} s")
    print(f"  plain stream, fsynced       {total / keep:8.1f} MB/s  {keep:6.1f} s")
    print(
        f"  server memory     {start / mib:.0f} MiB before, {most / mib:.0f} at most; bound of what it grew "
        f"by: {bound:.0f}"
    )
    print(
        f"{connected} idle clients: {each:.0f} KiB of server memory each; a status meanwhile "
        f"{1e3 * answer:.0f} ms\n"
    )
    return [
        claim(
            f"updates accepted of {count}, each read back",
            good,
            count,
            good / count,
            "= 1",
            good == count == len(accepted),
        ),
        claim(
            "MB/s up, other: plain gRPC stream that writes and fsyncs",
            total / seconds,
            total / keep,
            keep / seconds,
            ">= 0.5",
            keep >= 0.5 * seconds,
        ),
        claim(
            "MB/s up, other: plain gRPC stream that drops its bytes",
            total / seconds,
            total / drop,
            drop / seconds,
            ">= 0.5",
            drop >= 0.5 * seconds,
        ),
        at_most(
            "MiB that the server grew by under load, other: bound",
            (most - start) / mib,
            bound,
            1.0,
        ),
        at_most(
            f"KiB of server memory an idle client, {connected} connected, other: goal",
            each,
            IDLE,
            1.0,
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--full", action="store_true", help="200 clients x 16 MB and 1,000 idle ones")
    parser.add_argument(
        "--tiny",
        action="store_true",
        help="the smallest sizes: shows that the script runs, its figures mean nothing",
    )
    for name in ("--server", "--folder", "--address", "--kind"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    for name in ("--first", "--count", "--size"):
        parser.add_argument(name, type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.server:
        server(Path(options.server))
    elif options.kind:
        clients(
            Path(options.folder), options.address, options.kind, options.first, options.count, options.size
        )
    else:
        with tempfile.TemporaryDirectory() as folder:
            sizes = (
                (200, 16_000_000, 1000)
                if options.full
                else (2, 100_000, 3)
                if options.tiny
                else (20, 4_000_000, 200)
            )
            print(json.dumps(measure(Path(folder), *sizes)))


if __name__ == "__main__":
    main()

"""The exchange's process killed, its disk full: nothing is lost, nothing counts twice."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from fedtune.errors import FedtuneError
from fedtune.exchange import ServerStore
from fedtune.exchange.grpc_errors import understood
from fedtune.exchange.limits import CHUNK
from fedtune.trust import Receipt
from fedtune.wire.v1 import exchange_pb2 as pb
from tests.exchange.federation import BASE, STATE, Federation, Proxy, push, said
from tests.waiting import PATIENCE

MIB = 1 << 20
UPDATE = random.Random(24).randbytes(24 * MIB)


class Process:
    """The exchange of a federation in another process; always on the same port, behind a proxy on a slow
    line."""

    def __init__(self, federation: Federation) -> None:
        self.federation, self.port = federation, federation.server.address.rpartition(":")[2]
        federation.server.stop(0)
        self.proxy = Proxy(federation.server.address)
        self.running: subprocess.Popen[str] | None = None

    def start(self, point: str = "") -> None:
        folder, keys = self.federation.folder / "exchange", self.federation.folder / "keys" / "coordinator"
        command = [
            sys.executable,
            "-m",
            "tests.exchange.serving",
            str(folder),
            str(keys),
            self.port,
            *([point] if point else []),
        ]
        self.running = subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]
        )
        assert self.running.stdout and self.running.stdout.readline()

    def kill(self) -> None:
        if self.running:
            self.running.kill()
            self.running.wait()

    def upload(self, site: str = "site-a") -> tuple[threading.Thread, list[Receipt]]:
        """A client that sends and tries again until it holds its receipt."""
        client, got = self.federation.client(site, self.proxy.address, patience=30.0), list[Receipt]()
        thread = threading.Thread(
            target=lambda: got.append(client.send(self.federation.ticket(site), UPDATE))
        )
        thread.start()
        return thread, got


@pytest.fixture
def process(federation: Federation) -> Iterator[Process]:
    made = Process(federation)
    yield made
    made.kill()
    made.proxy.close()


def arrived(federation: Federation) -> int:
    """Bytes of updates that are on the coordinator's disk and do not count yet."""
    return sum(path.stat().st_size for path in (federation.folder / "exchange" / "incoming").iterdir())


def test_killed_in_the_middle_of_an_upload_it_goes_on_where_it_was(process: Process) -> None:
    federation, draw = process.federation, random.Random(0)
    process.start()
    process.proxy.pause = 0.005
    thread, got = process.upload()
    for at in sorted(draw.sample(range(2, 14), 3)):
        while arrived(federation) < at * MIB:
            assert thread.is_alive()
            time.sleep(0.002)
        process.kill()
        kept = arrived(federation)
        process.start()
        assert arrived(federation) >= kept >= at * MIB
    process.proxy.pause = 0.0
    thread.join(PATIENCE)
    assert got[0].payload == hashlib.sha256(UPDATE).hexdigest() and got[0].row == 1
    assert federation.server_store.read(
        "run-1", 1, "train", "site-a"
    ) == UPDATE and process.proxy.up < 1.7 * len(UPDATE)


@pytest.mark.parametrize("point", ["adopted", "counted"])
def test_killed_between_disk_and_receipt_an_update_counts_once(point: str, process: Process) -> None:
    federation = process.federation
    process.start(point)
    thread, got = process.upload()
    assert process.running
    process.running.wait(PATIENCE)
    rows = federation.server_store.accepted("run-1", 1, "train")
    assert len(rows) == (point == "counted") and not got
    process.start()
    thread.join(PATIENCE)
    assert got[0].row == 1 and len(federation.server_store.accepted("run-1", 1, "train")) == 1
    assert federation.server_store.read("run-1", 1, "train", "site-a") == UPDATE
    client = federation.client()
    assert push(client, said(federation, UPDATE, sequence=9), [])[-1].HasField(
        "receipt"
    )  # the same receipt for whoever asks again
    if rows:
        assert rows == federation.server_store.accepted("run-1", 1, "train")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m,mode=700", "tmpfs", str(disk)],
        capture_output=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_full_disk_takes_nothing_says_when_to_come_again_and_forgets_nothing(
    small_disk: Path, federation: Federation
) -> None:
    federation.server.stop(0)
    federation.server_store = ServerStore(small_disk / "exchange")
    federation.open(1)
    federation.server = federation.start()
    client, data = federation.client(patience=0.3), os.urandom(2 * MIB)
    filler = small_disk / "filler"
    filler.write_bytes(bytes(2 * MIB))
    with pytest.raises(FedtuneError, match=r"E804.*room for \d+ bytes.*expected 2097152") as full:
        client.send(federation.ticket(), data)
    assert str(small_disk) not in str(full.value)  # what the coordinator's disk is called is its own business
    assert not list((small_disk / "exchange" / "incoming").iterdir())
    filler.unlink()
    (got,) = client.flush()
    assert got.row == 1 and federation.server_store.read("run-1", 1, "train", "site-a") == data

    federation.server_store.release("run-1", 1)  # now it fills while an update comes in
    federation.server_store.open_round(
        "run-1",
        2,
        "train",
        BASE,
        {"site-a": federation.server_store.offer("run-1", STATE)},
        federation.budget,
    )
    envelope, step = said(federation, data, round=2, sequence=50), threading.Event()

    def requests() -> Any:
        yield pb.PushRequest(
            offer=pb.Offer(envelope=envelope.encode(), signature=client.identity.sign(envelope.encode()))
        )
        yield pb.PushRequest(piece=pb.Piece(data=data[:CHUNK]))
        step.wait(PATIENCE)
        for at in range(CHUNK, len(data), CHUNK):
            yield pb.PushRequest(piece=pb.Piece(data=data[at : at + CHUNK]))

    call = client._push(requests(), timeout=PATIENCE)
    while (
        not (parts := list((small_disk / "exchange" / "incoming").iterdir()))
        or parts[0].stat().st_size < CHUNK
    ):
        time.sleep(0.01)
    with pytest.raises(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(65536))
    step.set()
    with pytest.raises(grpc.RpcError) as caught:
        list(call)
    error, wait = understood(caught.value, "")
    assert error.code == "E804" and wait and str(small_disk) not in str(error)
    filler.unlink()
    there = parts[0].stat().st_size
    replies = push(
        client, envelope, (pb.Piece(data=data[at : at + CHUNK]) for at in range(there, len(data), CHUNK))
    )
    assert replies[0].offset >= CHUNK and federation.server_store.read("run-1", 2, "train", "site-a") == data

"""Real processes on a real socket, killed: the training ends with the same bits, and what a dead client had
is freed."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from fedtune.split.channel import Socket
from fedtune.split.service import Terms
from tests.split.link import Link
from tests.split.plain import Model, listening, opened, run
from tests.waiting import free_ports, wait_for

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
# A client that sends four micro-batches, takes the answers, says so, and hangs.
DOOMED = """
import sys, threading, torch
from fedtune.split.channel import Socket
from fedtune.split.micro import Micro
from tests.split.plain import WIDTH, opened
torch.set_num_threads(1)
stream = opened(lambda: Socket(sys.argv[1], beat=0.1), 7, lean=True)
for number in range(4):
    stream.forward(Micro(torch.ones(64, 64, WIDTH) * number))
for number in range(2):
    stream.answer()
print("held", flush=True)
threading.Event().wait()
"""


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def body_service(port: int) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.split.plain", "--port", str(port)],
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline().strip() == str(port)
    return process


@pytest.mark.thorough
def test_a_service_killed_twice_changes_no_bit() -> None:
    """Two clients, one of them lean. SIGKILL after the 10th and the 30th message of the first, with
    micro-batches in flight; the service
    is there again some seconds later, in a new process."""
    port = free_ports(1)[0]
    processes = [body_service(port)]
    kills, sent, models = [10, 30], 0, [Model(), Model()]

    class Fatal(Socket):
        def send(self, message: bytes) -> None:
            nonlocal sent
            super().send(message)
            sent += 1
            if kills and sent >= kills[0]:
                kills.pop(0)
                processes[-1].send_signal(signal.SIGKILL)
                processes[-1].wait()
                processes.append(body_service(port))

    def train(client: int) -> tuple[int, tuple[list[float], list[torch.Tensor]]]:
        stream = opened(
            lambda: (Socket if client else Fatal)(f"127.0.0.1:{port}"), client, lean=bool(client), window=2
        )
        trained = run(stream, steps=6, seed=client, model=models[client])
        stream.close()
        return stream.again, trained

    try:
        with ThreadPoolExecutor(2) as pool:
            results = list(pool.map(train, (0, 1)))
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert len(processes) == 3 and not kills and results[0][0] >= 2
    for client, (_, (losses, values)) in enumerate(results):
        wanted, parameters = run(None, steps=6, seed=client)
        assert losses == wanted and all(torch.equal(a, b) for a, b in zip(values, parameters, strict=True))


@pytest.mark.slow
def test_a_service_that_stands_still_is_noticed_and_waited_for() -> None:
    """SIGSTOP for 75 s, no reset, no farewell: a ping is not answered within 30 s, the client dials until the
    service is back."""
    port = free_ports(1)[0]
    process = body_service(port)

    class Halting(Socket):
        def send(self, message: bytes) -> None:
            nonlocal sent
            sent += 1
            if sent == 20:
                process.send_signal(signal.SIGSTOP)
                threading.Timer(75, process.send_signal, (signal.SIGCONT,)).start()
            super().send(message)

    sent = 0
    try:
        with opened(lambda: Halting(f"127.0.0.1:{port}")) as stream:
            losses, _ = run(stream, steps=6)
            assert stream.again > 0
    finally:
        process.kill()
        process.wait()
    assert losses == run(None, steps=6)[0]


@pytest.mark.thorough
def test_connections_that_break_change_no_bit() -> None:
    """A proxy resets every connection each 50 ms of a longer training, twelve times in all."""
    with listening() as (_, dial):
        link = Link(dial.port)
        cuts = 0

        def breaking() -> None:
            nonlocal cuts
            while cuts < 12 and not over.wait(0.05):
                link.cut()
                cuts += 1

        over = threading.Event()
        stream = opened(lambda: Socket(f"127.0.0.1:{link.port}"))
        thread = threading.Thread(target=breaking)
        thread.start()
        losses, values = run(stream, steps=150)
        over.set()
        thread.join()
        stream.close()
        link.close()
    wanted, parameters = run(None, steps=150)
    assert (
        cuts == 12
        and losses == wanted
        and all(torch.equal(a, b) for a, b in zip(values, parameters, strict=True))
    )


@pytest.mark.thorough
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_what_a_dead_client_had_is_freed_and_the_others_go_on(how: signal.Signals) -> None:
    """A kill is noticed by its reset, long before its lease of ten minutes; a stopped process when its lease
    is over; the other's losses are as ever."""
    with listening(Terms(lease=600.0 if how == signal.SIGKILL else 2.0)) as (service, dial):
        doomed = subprocess.Popen(
            [sys.executable, "-c", DOOMED, dial.address],
            cwd=ROOT,
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            assert doomed.stdout is not None and doomed.stdout.readline() == "held\n"
            other = opened(lambda: Socket(dial.address, beat=0.1), 1)
            half = run(other, steps=3)
            assert service.held.size >= 4 * 64 * 64 * 16 * 4
            doomed.send_signal(how)
            wait_for(lambda: not service.held.size and not service.live, "what it had to be freed")
            assert run(other, steps=3)[0] == half[0]
        finally:
            with contextlib.suppress(ProcessLookupError):
                doomed.send_signal(signal.SIGCONT)
            doomed.kill()
            doomed.wait()
        assert [
            session.hello.client for session in service.sessions.values() if session.connection is not None
        ] == [1]
        other.close()
    wanted, _ = run(None, steps=3)
    assert half[0] == wanted

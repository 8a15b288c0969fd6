"""A small model of three plain parts, whose unsplit run is the oracle of the stream's tests; and ways to
reach its body."""

from __future__ import annotations

import argparse
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fedtune.split.batching import MERGING, Merging
from fedtune.split.channel import Dial, Local, Socket
from fedtune.split.codec import Coding
from fedtune.split.cut import Side
from fedtune.split.grpc_server import serve
from fedtune.split.micro import Micro, Turn, Wishes
from fedtune.split.pipeline import train
from fedtune.split.service import TERMS, Service, Terms
from fedtune.split.session import Offer, Tokens
from fedtune.split.stream import Stream

WIDTH, VOCABULARY, PROMPTS = 16, 20, 3
OFFER = Offer("plain", "ab" * 32, 1, 3, WIDTH)
KEY = b"k" * 32


class Block(nn.Module):
    """Attention that heeds a mask and positions, and a perceptron."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.feed = nn.Sequential(nn.Linear(WIDTH, 32), nn.GELU(), nn.Linear(32, WIDTH))

    def forward(self, hidden: torch.Tensor, side: Side) -> torch.Tensor:
        placed = hidden if side.positions is None else hidden + torch.sin(side.positions.unsqueeze(-1) / 7)
        scores = self.query(placed) @ self.key(placed).transpose(1, 2) / WIDTH**0.5
        if side.mask is not None:
            scores = scores.masked_fill(side.mask[:, None] == 0, -torch.inf)
        hidden = hidden + scores.softmax(-1) @ self.value(hidden)
        return hidden + self.feed(hidden)


class Model(nn.Module):
    """Embeddings and a block, two blocks, a linear tail over the mean of real tokens: 20 tokens, 4
    classes."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.embed, self.first = nn.Embedding(VOCABULARY, WIDTH), Block()
            self.blocks = nn.ModuleList([Block(), Block()])
            self.tail = nn.Linear(WIDTH, 4)
            self.prompts = nn.Parameter(torch.randn(PROMPTS, WIDTH))
        for part in (self.embed, self.first, self.blocks):
            part.requires_grad_(False)

    def head(self, ids: torch.Tensor, side: Side) -> torch.Tensor:
        return self.first(torch.cat([self.prompts.expand(len(ids), -1, -1), self.embed(ids)], 1), side)

    def body(self, hidden: torch.Tensor, side: Side) -> torch.Tensor:
        for block in self.blocks:
            hidden = block(hidden, side)
        return hidden

    def loss(self, hidden: torch.Tensor, side: Side, labels: torch.Tensor) -> torch.Tensor:
        kept = torch.ones(hidden.shape[:2]) if side.mask is None else side.mask.float()
        pooled = (hidden * kept.unsqueeze(-1)).sum(1) / kept.sum(1, keepdim=True)
        return nn.functional.cross_entropy(self.tail(pooled), labels)

    @property
    def trained(self) -> list[torch.Tensor]:
        return [self.prompts, *self.tail.parameters()]


class PlainBody:
    """The two blocks as the service wants them."""

    def __init__(self, model: Model | None = None) -> None:
        self.model = model or Model()

    def forward(self, hidden: torch.Tensor, side: Side) -> torch.Tensor:
        with torch.no_grad():
            return self.model.body(hidden, side)

    def backward(self, hidden: torch.Tensor, side: Side, grad: torch.Tensor) -> torch.Tensor:
        leaf = hidden.detach().requires_grad_()
        return torch.autograd.grad(self.model.body(leaf, side), leaf, grad)[0]


Batch = tuple[torch.Tensor, Side, torch.Tensor]


def batches(count: int, seed: int = 0, rows: int = 2, length: int = 6) -> list[Batch]:
    """Padded batches of ids (rows, length), sides for prompts and ids, labels."""
    draw = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        lengths = torch.randint(2, length + 1, (rows,), generator=draw)
        lengths[0] = length
        mask = (torch.arange(PROMPTS + length) < PROMPTS + lengths[:, None]).to(torch.uint8)
        positions = torch.arange(PROMPTS + length).expand(rows, -1) + 1
        made.append(
            (
                torch.randint(0, VOCABULARY, (rows, length), generator=draw),
                Side(mask, positions),
                torch.randint(0, 4, (rows,), generator=draw),
            )
        )
    return made


def split_step(model: Model, stream: Stream, todo: list[Batch]) -> list[float]:
    """Gradients of a step through the cut; the losses."""
    return train(
        stream,
        todo,
        lambda batch: Micro(model.head(batch[0], batch[1]), batch[1]),
        lambda batch, hidden: model.loss(hidden, batch[1], batch[2]) / len(todo),
    )


def whole_step(model: Model, todo: list[Batch]) -> list[float]:
    """The same without a cut."""
    losses = []
    for ids, side, labels in todo:
        loss = model.loss(model.body(model.head(ids, side), side), side, labels) / len(todo)
        loss.backward()
        losses.append(float(loss.detach()))
    return losses


def run(
    stream: Stream | None, steps: int = 3, micros: int = 4, seed: int = 0, model: Model | None = None
) -> tuple[list[float], list[torch.Tensor]]:
    """A little training: losses, and the parameters it ends with. Without a stream it is the oracle."""
    model = model or Model()
    optimizer, losses = torch.optim.Adam(model.trained, 0.01), []
    for step in range(steps):
        optimizer.zero_grad()
        todo = batches(micros, seed * 1000 + step)
        losses += whole_step(model, todo) if stream is None else split_step(model, stream, todo)
        optimizer.step()
    return losses, [value.detach().clone() for value in model.trained]


def turn(client: int = 0, round: int = 1, peer: str = "") -> Turn:
    return Turn("run", round, client, Tokens(KEY).issue("run", round, client, peer))


def opened(dial: Dial, client: int = 0, **wishes: Any) -> Stream:
    return Stream(dial, OFFER, turn(client), Wishes(**{"coding": Coding("fp32"), "window": 4, **wishes}))


def served(terms: Terms = TERMS, merging: Merging | None = MERGING, body: Any = None) -> Service:
    return Service(body or PlainBody(), OFFER, Tokens(KEY).admit, terms, merging)


@dataclass(frozen=True)
class Door:
    """How to dial a service on a socket."""

    address: str

    def __call__(self) -> Socket:
        return Socket(self.address)

    @property
    def port(self) -> int:
        return int(self.address.rsplit(":", 1)[1])


@contextmanager
def listening(
    terms: Terms = TERMS, merging: Merging | None = MERGING, body: Any = None
) -> Iterator[tuple[Service, Door]]:
    """A service on a real socket, and how to dial it."""
    service = served(terms, merging, body).start()
    server, port = serve(service, "127.0.0.1:0")
    try:
        yield service, Door(f"127.0.0.1:{port}")
    finally:
        service.stop()
        server.stop(0.2).wait()


def near(service: Service) -> Dial:
    """The same service without a socket."""
    return lambda: Local(service)


def main() -> None:
    """A body service in a process of its own, for tests that kill it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=0)
    torch.set_num_threads(1)
    _, port = serve(served().start(), f"127.0.0.1:{parser.parse_args().port}")
    print(port, flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main()
